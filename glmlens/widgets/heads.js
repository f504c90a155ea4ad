// All heads of a layer as thumbnails, one of them large, and the tokens that each token attends to or is attended by.
// Model text is set through textContent alone. Every selection is sent to the kernel, which answers with the state.

const STYLE = `
.glmlens-heads { color: var(--jp-ui-font-color1, inherit); font: 13px/1.5 var(--jp-ui-font-family, system-ui); }
.glmlens-heads .top { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start; }
.glmlens-heads .grid { display: flex; flex-wrap: wrap; gap: 8px; max-width: 680px; padding: 3px; }
.glmlens-heads .group { display: flex; flex-wrap: wrap; gap: 6px; max-width: 680px; padding-left: 6px;
  border-left: 4px solid; border-radius: 2px; }
.glmlens-heads .group > div.name { width: 0; min-width: 100%; white-space: nowrap; font-size: 11px; line-height: 1.2; }
.glmlens-heads figure { margin: 0; text-align: center; font-size: 11px; line-height: 1.3; cursor: pointer; }
.glmlens-heads canvas { image-rendering: pixelated; display: block; outline: 1px solid var(--jp-border-color2, #8886); }
.glmlens-heads figure canvas { width: var(--side); height: var(--side); }
.glmlens-heads figure.chosen canvas { outline: 3px solid var(--jp-brand-color1, #1976d2); }
.glmlens-heads figure.chosen.locked canvas { outline-style: double; outline-width: 5px; }
.glmlens-heads .large canvas { width: 420px; height: 420px; cursor: crosshair; }
.glmlens-heads [tabindex]:focus-visible { box-shadow: 0 0 0 2px var(--jp-brand-color1, #1976d2); outline: none; }
.glmlens-heads .tokens { margin: 8px 0; padding: 4px; line-height: 1.9; max-height: 240px; overflow-y: auto; }
.glmlens-heads .tokens span { padding: 2px 3px; border-radius: 3px; margin-right: 1px; cursor: pointer;
  white-space: pre-wrap; border-bottom: 3px solid transparent; }
.glmlens-heads .tokens span.at { outline: 2px solid var(--jp-ui-font-color1, currentColor); }
.glmlens-heads .description { min-height: 1.5em; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.glmlens-heads .hovered { min-height: 1.5em; opacity: .75; overflow-wrap: anywhere; }
.glmlens-heads .legend { font-size: 11px; opacity: .8; white-space: pre-wrap; }
`;
const KEYS = "67,147,195", QUERIES = "214,96,77"; // blue: keys it attends to; red: queries attending to it
const GROUPS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999"];

const make = (tag, name, parent, text = "") => {
  const element = document.createElement(tag);
  element.className = name;
  element.textContent = text;
  parent.append(element);
  return element;
};
const bytes = (view) => new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
const row = (i) => (i * (i + 1)) / 2; // index of the first cell of row i of a lower triangle

/** Draw a lower triangle of bytes, `side` blocks wide; cells of later keys stay transparent. */
function paint(canvas, cells, start, side, palette) {
  canvas.width = canvas.height = side;
  const context = canvas.getContext("2d");
  const picture = context.createImageData(side, side);
  let from = start;
  for (let y = 0; y < side; y++)
    for (let x = 0; x <= y; x++) {
      const to = 4 * (y * side + x), color = 3 * cells[from++];
      picture.data[to] = palette[color];
      picture.data[to + 1] = palette[color + 1];
      picture.data[to + 2] = palette[color + 2];
      picture.data[to + 3] = 255;
    }
  context.putImageData(picture, 0, 0);
}

function render({ model, el }) {
  let ahead = {}, last; // selections by key that the kernel has not answered yet: the next key starts from these
  const get = (name) => (name in ahead ? ahead[name] : model.get(name));
  const root = make("div", "glmlens-heads", el);
  make("style", "", root, STYLE);
  const top = make("div", "top", root);
  const grid = make("div", "grid", top);
  const large = make("div", "large", top);
  const canvas = make("canvas", "", large);
  make("div", "legend", large, "rows: queries, columns: keys");
  const strip = make("div", "tokens", root);
  const legend = make("div", "legend", root);
  for (const [color, sign, text] of [
    [KEYS, "■", " attended to by this token   "],
    [QUERIES, "▁", " attends to this token"],
  ]) {
    make("span", "", legend, sign).style.color = `rgb(${color})`;
    legend.append(text);
  }
  const description = make("div", "description", root);
  const hovered = make("div", "hovered", root);
  description.setAttribute("aria-live", "polite");
  for (const [part, role, name] of [
    [grid, "radiogroup", "heads: arrow keys select, Enter locks, Escape unlocks"],
    [canvas, "application", "attention of one head: arrow keys move the query and the key"],
    [strip, "application", "tokens: arrow keys select one, Escape none"],
  ]) {
    part.tabIndex = 0;
    part.setAttribute("role", role);
    part.setAttribute("aria-label", name);
  }
  let figures = [], spans = [], over = null, hoveredToken = -1;

  const send = (places) => model.send({ select: places });
  const label = (i) => `${i} ${get("labels")[i]}`;
  /** The head that is drawn large: the one under the mouse, unless one is locked. */
  const shown = () => (over === null || get("locked") ? get("head") : over);
  /** The cells of the head that is drawn: in full if they are here, else its thumbnail. */
  function source() {
    const full = shown() === get("cells_head") && get("side") > 0;
    const side = full ? get("side") : get("thumbnail_side"), block = full ? get("block") : get("thumbnail_block");
    return { full, side, block, cells: bytes(get(full ? "cells" : "thumbnails")),
             start: full ? 0 : shown() * row(side) };
  }
  const scaled = (v) => (v / 255) * get("max_weight");

  function build() {
    grid.replaceChildren();
    figures = [];
    const heads = get("n_heads"), groups = get("n_kv_heads");
    grid.style.setProperty("--side", heads <= 8 ? "150px" : heads <= 16 ? "100px" : "72px");
    for (let g = 0; g < groups; g++) {
      const group = make("div", "group", grid);
      group.style.borderLeftColor = GROUPS[g % GROUPS.length];
      make("div", "name", group, groups < heads ? `kv ${g}` : "");
      for (let h = (g * heads) / groups; h < ((g + 1) * heads) / groups; h++) {
        const figure = make("figure", "", group);
        figure.setAttribute("role", "radio");
        figure.setAttribute("aria-label", `head ${h}`);
        figures.push(figure);
        make("canvas", "", figure);
        make("figcaption", "", figure, `${h}`);
        figure.onmouseenter = () => { over = h; drawLarge(); highlight(); };
        figure.onmouseleave = () => { over = null; drawLarge(); highlight(); };
        figure.onclick = () => send(h === get("head") && get("locked") ? { locked: false } : { head: h, locked: true });
      }
    }
    drawThumbnails();
  }

  function drawThumbnails() {
    const side = get("thumbnail_side"), cells = bytes(get("thumbnails")), palette = bytes(get("palette"));
    if (cells.length < figures.length * row(side)) return;
    figures.forEach((figure, h) => paint(figure.querySelector("canvas"), cells, h * row(side), side, palette));
  }

  function writeTokens() {
    strip.replaceChildren();
    spans = get("labels").map((text, i) => {
      const span = make("span", "", strip, text);
      span.title = label(i);
      span.onmouseenter = () => { hoveredToken = i; highlight(); };
      span.onmouseleave = () => { hoveredToken = -1; highlight(); };
      span.onclick = () => send({ query: i === get("query") ? -1 : i });
      strip.append(text.endsWith("↵") ? document.createElement("br") : document.createElement("wbr"));
      return span;
    });
  }

  function drawLarge() {
    const s = source(), palette = bytes(get("palette"));
    if (!s.side || s.cells.length < s.start + row(s.side)) return;
    paint(canvas, s.cells, s.start, s.side, palette);
    markCell(s);
  }

  /** Mark the selected query row, and the selected cell in it. */
  function markCell(s) {
    const [q, k] = [get("query"), get("key")];
    if (q < 0) return;
    const context = canvas.getContext("2d"), at = (i) => Math.floor(i / s.block);
    context.fillStyle = "rgba(255,80,80,.35)";
    context.fillRect(0, at(q), at(q) + 1, 1);
    if (k >= 0 && k <= q) {
      context.fillStyle = "rgb(255,80,80)";
      context.fillRect(at(k), at(q), 1, 1);
    }
  }

  /** Keys that token i attends to (which 0) or queries attending to it (which 1): [token, weight from 0 to 255]. */
  function linked(i, which) {
    const s = source(), n = get("labels").length, links = [];
    const k = get("top_k");
    if (s.full && s.block > 1 && k) {
      const at = new Uint32Array(bytes(get("top_at")).slice().buffer), weights = bytes(get("top_weights"));
      for (let j = 0; j < k; j++) {
        const from = (which * n + i) * k + j;
        if (weights[from]) links.push([at[from], weights[from]]);
      }
      return links;
    }
    const own = Math.floor(i / s.block);
    for (let j = 0; j < n; j++) {
      const other = Math.floor(j / s.block), [q, key] = which ? [other, own] : [own, other];
      if ((which ? j < i : j > i) || key > q) continue;
      const weight = s.cells[s.start + row(q) + key];
      if (weight) links.push([j, weight]);
    }
    return links;
  }

  function highlight() {
    const i = hoveredToken >= 0 ? hoveredToken : get("query"), by = get("shown_links");
    const back = new Map(i >= 0 && by !== "key" ? linked(i, 0) : []);
    const under = new Map(i >= 0 && by !== "query" ? linked(i, 1) : []);
    spans.forEach((span, j) => {
      span.style.backgroundColor = back.has(j) ? `rgba(${KEYS},${0.12 + (0.88 * back.get(j)) / 255})` : "";
      span.style.borderBottomColor = under.has(j) ? `rgba(${QUERIES},${0.2 + (0.8 * under.get(j)) / 255})` : "";
      span.classList.toggle("at", j === i);
    });
    hovered.textContent = hoveredToken >= 0 ? describe(back, under, i) : "";
  }

  /** The strongest links of a token in words. */
  function describe(back, under, i) {
    const best = (links) => [...links].sort((a, b) => b[1] - a[1]).slice(0, 3)
      .map(([j, w]) => `${label(j)} ≈${scaled(w).toFixed(2)}`).join(", ");
    const words = [`head ${shown()}, ${label(i)}`];
    if (back.size) words.push(`attends to ${best(back)}`);
    if (under.size) words.push(`attended to by ${best(under)}`);
    return words.join(" · ");
  }

  function markHead() {
    figures.forEach((figure, h) => {
      figure.classList.toggle("chosen", h === get("head"));
      figure.classList.toggle("locked", h === get("head") && get("locked"));
      figure.setAttribute("aria-checked", h === get("head"));
    });
    description.textContent = get("description");
  }

  /** The query and key at a place of the mouse. */
  function cell(event) {
    const box = canvas.getBoundingClientRect(), s = source(), n = get("labels").length;
    const at = (share) => Math.min(n - 1, Math.max(0, Math.floor(share * s.side) * s.block));
    return [at((event.clientY - box.top) / box.height), at((event.clientX - box.left) / box.width)];
  }
  canvas.onmousemove = (event) => {
    const [q, k] = cell(event), s = source();
    const value = s.cells[s.start + row(Math.floor(q / s.block)) + Math.floor(k / s.block)];
    const about = s.block > 1 ? ` (maximum of ${s.block} × ${s.block} tokens)` : "";
    hovered.textContent = k > q ? "" :
      `head ${shown()}: query ${label(q)} → key ${label(k)} ≈${scaled(value).toFixed(2)}${about}`;
  };
  canvas.onmouseleave = () => { hovered.textContent = ""; };
  canvas.onclick = (event) => {
    const [q, k] = cell(event);
    send(k > q ? { query: q } : { query: q, key: k });
  };

  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  /** Keys do not reach the notebook, which would take them for commands. */
  const keys = (part, act) => part.addEventListener("keydown", (event) => {
    event.stopPropagation();
    const far = event.shiftKey ? 10 : 1, [x, y] = steps[event.key] || [0, 0];
    if (act(event.key, x * far, y * far)) event.preventDefault();
  });
  const within = (i) => Math.max(0, Math.min(get("labels").length - 1, i));
  /** Show a selection at once, before the kernel answers. A refused one has no answer: drop it after 10 seconds. */
  const go = (places) => {
    Object.assign(ahead, places);
    clearTimeout(last);
    last = setTimeout(() => { ahead = {}; redraw("ahead"); }, 10000);
    send(places);
    redraw("ahead");
  };
  const answered = () => {
    for (const name of Object.keys(ahead)) if (ahead[name] === model.get(name)) delete ahead[name];
  };
  keys(grid, (key, x, y) => {
    if (key === "Enter" || key === " ") return go({ locked: !get("locked") }), true;
    if (key === "Escape") return go({ locked: false }), true;
    if (x) return go({ head: Math.max(0, Math.min(figures.length - 1, get("head") + x)) }), true;
    if (y) return go({ head: beside(get("head"), Math.sign(y)) }), true;
  });
  /** The nearest head in the rows above (way -1) or below (way 1). */
  function beside(head, way) {
    const places = figures.map((figure) => figure.getBoundingClientRect()), here = places[head];
    const far = (box) => Math.abs(box.top - here.top) * 3 + Math.abs(box.left - here.left);
    const beyond = places.map((_, h) => h).filter((h) => way * (places[h].top - here.top) > 4);
    return beyond.length ? beyond.reduce((a, b) => (far(places[b]) < far(places[a]) ? b : a)) : head;
  }
  keys(canvas, (key, x, y) => {
    if (key === "Escape") return go({ query: -1, key: -1 }), true;
    if (!x && !y) return false;
    const query = within(Math.max(get("query"), 0) + y);
    return go({ query, key: Math.min(query, within(Math.max(get("key"), 0) + x)) }), true;
  });
  keys(strip, (key, x, y) => {
    if (key === "Escape") return go({ query: -1 }), true;
    if (!x && !y) return false;
    return go({ query: within(get("query") + x + y) }), true;
  });

  let waiting = new Set();
  const draw = () => {
    const changed = waiting;
    waiting = new Set();
    const any = (...names) => names.some((name) => changed.has(name));
    if (any("labels")) writeTokens();
    if (any("n_heads", "n_kv_heads", "labels")) build();
    else if (any("thumbnails", "palette")) drawThumbnails();
    drawLarge();
    highlight();
    markHead();
    root.dataset.drawn = `${get("drawing_number")}`;
  };
  const redraw = (name) => {
    if (!waiting.size) requestAnimationFrame(draw);
    waiting.add(name);
  };
  for (const name of ["labels", "n_heads", "n_kv_heads", "thumbnails", "palette", "cells", "top_at", "max_weight", "head",
    "locked", "query", "key", "shown_links", "description", "drawing_number"])
    model.on(`change:${name}`, () => redraw(name));
  model.on("change:drawing_number", answered);
  waiting = new Set(["labels"]);
  draw();
  return () => { clearTimeout(last); root.remove(); };
}

export default { initialize, render };
