"""The notebooks and the course in a real JupyterLab, run as by hand: no cell fails, and nothing is sent elsewhere."""

import json

import pytest
from test_notebooks import EXPLORERS, each
from test_tutorials import COURSE

import glmlens.lab_command

RUN_ALL = """(async (path, kernel) => {
  const {commands, shell} = window.jupyterapp, before = shell.currentWidget;
  const options = kernel ? {kernel: {id: kernel}} : {};
  const panel = await commands.execute('docmanager:open', {path, factory: 'Notebook', ...options});
  await Promise.all([panel.context.ready, panel.revealed, panel.sessionContext.ready]);
  const here = panel.sessionContext.session.kernel;
  if (kernel) await here.requestExecute({code: 'get_ipython().reset(new_session=True)', silent: true}).done;
  shell.activateById(panel.id);
  await commands.execute('notebook:run-all-cells');
  const cells = panel.content.widgets.filter(cell => cell.model.type === 'code');
  const outputs = cells.flatMap(cell => cell.model.outputs.toJSON());
  const found = {
    run: cells.map(cell => cell.model.executionCount),
    wrong: outputs.filter(o => o.output_type === 'error' || o.name === 'stderr').map(o => o.evalue || o.text),
    kinds: outputs.flatMap(o => Object.keys(o.data || {})),
    kernel: here.id,
  };
  window.leave = async () => {
    if (kernel === undefined) await panel.sessionContext.shutdown();
    panel.dispose();
    shell.activateById(before.id);
    await new Promise(later => setTimeout(later, 1000));
    return 0;
  };
  return JSON.stringify(found);
})"""


@pytest.fixture(scope="module")
def opened(lab):
    glmlens.lab_command.copy_lab(lab.folder / "root" / "mine")
    return lab


@pytest.fixture
def page(opened):
    """The page until the notebook is closed. Widgets whose kernel ends while they are made reject their promises."""
    opened.errors = []
    yield opened
    opened.run("window.leave?.()")
    opened.errors = []


@pytest.fixture(scope="module")
def shared():
    """The kernel that the tutorials share, reset before each: other tests run them alone, and imports are slow."""
    return {"kernel": None}


@each
def test_a_notebook_runs_in_jupyterlab(path, page):
    found = json.loads(page.run(f"{RUN_ALL}({json.dumps(f'mine/notebooks/{path.stem}.ipynb')})"))
    assert found["wrong"] == []
    assert found["run"] == list(range(1, len(found["run"]) + 1))
    assert found["kinds"].count("application/vnd.plotly.v1+json") >= 4
    assert found["kinds"].count("application/vnd.jupyter.widget-view+json") == len(EXPLORERS.get(path.stem, []))
    assert page.errors == []
    assert page.strangers() == []


@pytest.mark.parametrize("path", COURSE, ids=lambda path: path.stem)
def test_a_tutorial_runs_in_jupyterlab(path, page, shared):
    where = json.dumps(f"mine/tutorials/{path.stem}.ipynb")
    found = json.loads(page.run(f"{RUN_ALL}({where}, {json.dumps(shared['kernel'])})"))
    assert shared["kernel"] in (None, found["kernel"])
    shared["kernel"] = found["kernel"]
    wrong = [text for text in found["wrong"] if text.strip()]
    assert [text for text in wrong if not text.startswith("harvesting")] == []  # a progress bar
    assert found["run"] == list(range(1, len(found["run"]) + 1))
    assert found["kinds"].count("application/vnd.plotly.v1+json") >= 1
    assert page.errors == []
    assert page.strangers() == []
