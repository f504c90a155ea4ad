// A plotly.js figure that is replaced by new figures. The library is loaded once for all charts of the page.

const LIBRARY = Symbol.for("glmlens.plotly");

/** Load plotly.js as a module from the value of a plain text widget. */
async function load(manager, id) {
  const source = (await manager.get_model(id)).get("value");
  const module = `const module = { exports: {} }, exports = module.exports, define = undefined;
    ${source}\n;export default module.exports;`;
  const url = URL.createObjectURL(new Blob([module], { type: "text/javascript" }));
  try {
    return (await import(url)).default;
  } finally {
    URL.revokeObjectURL(url);
  }
}

async function render({ model, el, signal }) {
  const box = document.createElement("div");
  el.append(box);
  window[LIBRARY] ??= load(model.widget_manager, model.get("library"));
  const plotly = await window[LIBRARY].catch((error) => {
    delete window[LIBRARY]; // the next chart tries again
    if (!signal?.aborted) throw error;
  });
  if (!plotly) return;
  let drawing = Promise.resolve(), drawn;
  const draw = () => {
    drawing = drawing.catch(() => {}).then(async () => {
      const text = model.get("figure");
      if (!text || !box.isConnected) return; // off the page: drawn when it is back
      const { data, layout } = JSON.parse(text);
      await plotly.react(box, data, layout, model.get("config"));
      drawn = text;
    });
    return drawing;
  };
  while (!box.isConnected && !signal?.aborted) await new Promise(requestAnimationFrame); // plotly needs the width of the cell
  model.on("change:figure", draw);
  await draw();
  box.on?.("plotly_click", ({ points }) => model.send({ click: [points[0].pointNumber].flat() }));
  const fit = () => box.clientWidth && (drawn === model.get("figure") ? plotly.Plots.resize(box) : draw());
  const watch = new ResizeObserver(fit);
  watch.observe(el);
  return () => {
    watch.disconnect();
    model.off("change:figure", draw);
    plotly.purge(box);
  };
}

export default { initialize, render };
