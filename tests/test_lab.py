"""glmlens lab: a folder of your own, what you changed in it, and a JupyterLab that opens it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from glmlens import lab_command as lab
from glmlens.cli import main

ROOT = Path(__file__).parents[1]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An installed package with three files: its folder, and a folder for the copies."""
    inside = tmp_path / "inside"
    for name in (
        "tutorials/README.md",
        "tutorials/01.ipynb",
        "notebooks/README.md",
        "notebooks/.ipynb_checkpoints/a.md",
    ):
        (inside / name).parent.mkdir(parents=True, exist_ok=True)
        (inside / name).write_text(f"first {name}")
    (inside / "tutorials" / "01.py").write_text("# %%")
    monkeypatch.setattr(lab, "BUNDLED_FILES", inside)
    return inside, tmp_path / "mine"


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.*") if path.is_file()}


def test_notebooks_and_pages_are_copied_and_sources_are_not(here):
    inside, mine = here
    done = lab.copy_lab(mine)
    assert done.new == ["tutorials/01.ipynb", "tutorials/README.md", "notebooks/README.md"]
    assert set(files(mine)) == {*done.new, lab.LAB_MANIFEST}
    assert (mine / "tutorials" / "01.ipynb").read_bytes() == (inside / "tutorials" / "01.ipynb").read_bytes()


def test_a_second_copy_changes_nothing(here):
    _, mine = here
    lab.copy_lab(mine)
    before = files(mine)
    assert len(lab.copy_lab(mine).unchanged) == 3
    assert files(mine) == before


def test_what_was_edited_stays_and_what_was_not_is_updated(here):
    inside, mine = here
    lab.copy_lab(mine)
    (mine / "tutorials" / "01.ipynb").write_text("mine")
    for name in ("tutorials/01.ipynb", "tutorials/README.md"):
        (inside / name).write_text(f"second {name}")
    for _ in range(2):  # it is known as edited also the next time
        done = lab.copy_lab(mine)
        assert done.preserved == ["tutorials/01.ipynb"]
        assert (mine / "tutorials" / "01.ipynb").read_text() == "mine"
        assert (mine / "tutorials" / "README.md").read_text() == "second tutorials/README.md"
    (mine / "tutorials" / "01.ipynb").rename(mine / "tutorials" / "my 01.ipynb")
    assert lab.copy_lab(mine).new == ["tutorials/01.ipynb"]
    assert (mine / "tutorials" / "my 01.ipynb").read_text() == "mine"


def test_files_that_were_there_before_are_nobodys_copies(here):
    _, mine = here
    (mine / "tutorials").mkdir(parents=True)
    (mine / "tutorials" / "README.md").write_text("of another project")
    (mine / "notebooks").mkdir()
    (mine / "notebooks" / "README.md").symlink_to(mine / "elsewhere.md")
    assert lab.copy_lab(mine).preserved == ["tutorials/README.md", "notebooks/README.md"]
    assert (mine / "tutorials" / "README.md").read_text() == "of another project"
    assert not (mine / "elsewhere.md").exists()


@pytest.mark.parametrize("broken", ["", "[]", '{"files": 3}', '{"files": {"tutorials/01.ipynb": null}}', "\udcff"])
def test_without_a_readable_manifest_everything_that_differs_is_kept(here, broken):
    inside, mine = here
    lab.copy_lab(mine)
    (mine / lab.LAB_MANIFEST).write_bytes(broken.encode("utf-8", "surrogateescape"))
    (inside / "tutorials" / "01.ipynb").write_text("second")
    done = lab.copy_lab(mine)
    assert (done.preserved, len(done.unchanged)) == (["tutorials/01.ipynb"], 2)


def test_a_copy_that_breaks_off_leaves_no_half_file(here, monkeypatch):
    _, mine = here

    def full(path, data):
        with path.open("wb") as half:
            half.write(data[:3])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as during:
        during.setattr(Path, "write_bytes", full)
        with pytest.raises(lab.LabError, match=r"mine: No space left on device; give another folder"):
            lab.copy_lab(mine)
    assert files(mine) == {}
    assert len(lab.copy_lab(mine).new) == 3


# ---- the command ----


def test_the_command_says_what_it_copied(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["lab", "mine", "--copy-only"]) == 0
    assert re.match(rf"{tmp_path}/mine: \d+ new, 0 updated, 0 unchanged\n$", capsys.readouterr().out)
    (tmp_path / "mine" / "notebooks" / "patching.ipynb").write_text("{}")
    assert main(["lab", "mine", "--copy-only"]) == 0
    assert "not overwritten, because you edited it: notebooks/patching.ipynb (rename it" in capsys.readouterr().out


def test_a_folder_that_is_a_file_is_one_line_and_status_2(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["lab", str(tmp_path / "file"), "--copy-only"]) == 2
    assert "file: File exists; give another folder: glmlens lab FOLDER" in capsys.readouterr().err


def test_without_jupyterlab_it_says_what_to_install(here, capsys, monkeypatch):
    monkeypatch.setattr(lab, "find_spec", lambda name: None)
    assert main(["lab", str(here[1])]) == 2
    assert 'JupyterLab is not installed: pip install "jupyterlab' in capsys.readouterr().err
    assert (here[1] / "tutorials" / "01.ipynb").exists()


def test_options_reach_jupyterlab(here, monkeypatch):
    became = []
    monkeypatch.setattr(lab, "find_spec", lambda name: object())
    monkeypatch.setattr(os, "execv", lambda path, argv: became.append(argv))
    assert main(["lab", str(here[1]), "--no-browser", "--port", "8899", "--", "--allow-root"]) == 0
    root = f"--ServerApp.root_dir={here[1]}"
    assert became == [[sys.executable, "-m", "jupyterlab", root, "--no-browser", "--port=8899", "--allow-root"]]
    with pytest.raises(SystemExit):
        main(["lab", str(here[1]), "--copy-onyl"])


@pytest.mark.skipif(find_spec("jupyterlab") is None, reason="no JupyterLab")
def test_jupyterlab_opens_in_the_folder(tmp_path):
    code = "import sys; from glmlens.cli import main; main(sys.argv[1:])"
    own = {f"JUPYTER_{name}_DIR": str(tmp_path / name) for name in ("CONFIG", "RUNTIME", "DATA")}
    argv = [sys.executable, "-c", code, "lab", "mine", "--no-browser", "--port", "0", "--", "--allow-root"]
    with (tmp_path / "log").open("w") as log:
        env = os.environ | own | {"PYTHONPATH": str(ROOT)}
        server = subprocess.Popen([*argv, "--ServerApp.ip=127.0.0.1"], cwd=tmp_path, stdout=log, stderr=log, env=env)
    try:
        said = running(server, tmp_path)
        url = f"http://127.0.0.1:{said['port']}/api/contents/tutorials?token={said['token']}"
        names = {entry["name"] for entry in json.load(urllib.request.urlopen(url, timeout=60))["content"]}
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    assert {"README.md", "01_from_tokens_to_logits.ipynb", "images"} <= names


def running(server, folder, patience=120):
    """What a server says of itself when it has started."""
    end = time.monotonic() + patience
    while time.monotonic() < end and server.poll() is None:
        for path in (folder / "RUNTIME").glob("jpserver-*.json"):
            if (text := path.read_text()).endswith("}"):
                return json.loads(text)
        time.sleep(0.2)
    raise AssertionError((folder / "log").read_text()[-2000:])


def test_links_of_what_is_copied_lead_to_what_is_copied():
    here = dict(lab.list_originals())
    for name, path in here.items():
        links = re.findall(r"\]\(([^)\s#]+)\)", path.read_text(encoding="utf-8")) if path.suffix != ".png" else []
        for link in links:
            aim = os.path.normpath(Path(name).parent / link)
            assert link.startswith(("http", "\\")) or aim in here, (name, link)


# ---- the wheel ----


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that a wheel was unpacked to, as pip does it."""
    if find_spec("hatchling") is None or not (ROOT / "pyproject.toml").exists():
        pytest.skip("not a checkout, or nothing that builds it")
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def test_a_wheel_has_every_notebook_and_page(installed):
    inside = installed / "glmlens" / "lab_files"
    here = dict(lab.list_originals())
    assert {"notebooks/patching.ipynb", "tutorials/hook_points.md", "tutorials/images/glmlens.png"} <= set(here)
    for name, path in here.items():
        assert (inside / name).read_bytes() == path.read_bytes(), name
    assert not list(installed.rglob("*.pyc"))


def test_an_installed_package_copies_from_itself(installed, tmp_path):
    code = "import glmlens; from glmlens.cli import main; print(glmlens.__file__); main(['lab', 'mine', '--copy-only'])"
    env = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(str(installed))
    assert (tmp_path / "mine" / "notebooks" / "README.md").exists()
    names = {path.relative_to(tmp_path / "mine").as_posix() for path in (tmp_path / "mine").rglob("*.*")}
    assert {name for name, _ in lab.list_originals()} <= names
