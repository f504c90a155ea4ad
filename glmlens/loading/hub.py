"""From a folder's path or a hub id to a local folder with a checkpoint: only what a GLM is read from is downloaded."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from glmlens.config import CheckpointError
from glmlens.storage import expand_path, read_json

INDEX_FILE, WEIGHTS_FILE = "model.safetensors.index.json", "model.safetensors"
SMALL_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"]
SMALL_FILES += ["chat_template.jinja"]  # besides these and the weights, nothing is ever downloaded


def find_checkpoint(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """The local folder of a checkpoint: a folder as it is, a hub id after downloading what is missing of it.

    Raises CheckpointError when there is no such folder, or when the hub does not give it.
    """
    folder, name = expand_path(path_or_hub_id, CheckpointError), str(path_or_hub_id)
    if folder.is_dir() and revision is not None:
        raise CheckpointError(f"{folder}: a folder has no revision {revision!r}; only a hub id has")
    if folder.is_dir():
        return folder
    if name.startswith(("https:", "http:")):
        raise CheckpointError(f"{name}: an address; give the hub id alone: {'/'.join(name.split('/')[3:5])!r}")
    if revision is None and folder.exists():
        raise CheckpointError(f"{name}: a file; give the folder that holds its config.json")
    if isinstance(path_or_hub_id, Path) or folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise CheckpointError(f"{name}: no such folder; give a folder with a config.json, or a hub id, 'org/name'")
    return download_checkpoint(name, revision)


def download_checkpoint(name: str, revision: str | None = None) -> Path:
    """The folder in the hub's cache of a repository at a revision: a branch, a tag or a commit.

    A connection that breaks is taken up where it broke. Whatever else ends a download, files that have arrived whole
    are not asked for again. HF_TOKEN, HF_HUB_OFFLINE, HF_HUB_CACHE and HF_ENDPOINT are
    obeyed; without a network, what is in the cache is opened. Raises CheckpointError that says what to type.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        files = {file.rfilename for file in HfApi().model_info(name, revision=revision).siblings or []}
    except (HFValidationError, GatedRepoError, RevisionNotFoundError, RepositoryNotFoundError) as e:
        raise CheckpointError(explain_refusal(name, revision, e)) from e
    except Exception as e:  # by its version, huggingface_hub lets through what requests, httpx or httpx2 raise
        return find_cached_checkpoint(name, revision, e)
    needed = [file for file in SMALL_FILES if file in files] + select_weight_files(files, name)
    try:
        return fetch_files(name, revision, needed, files)
    except CheckpointError:
        raise
    except Exception as e:
        said = f"{name}: the download stopped: {type(e).__name__}: {e}"
        raise CheckpointError(f"{said}. Load it again to go on: files that arrived whole are kept") from e


def fetch_files(name: str, revision: str | None, needed: list[str], files: Iterable[str]) -> Path:
    """Fetch files one after another: huggingface_hub keeps whole ones, so that a stop costs the one under way alone."""
    from huggingface_hub import hf_hub_download

    many = INDEX_FILE in needed
    folder = Path(hf_hub_download(name, INDEX_FILE if many else "config.json", revision=revision)).parent
    needed = needed + list_shards(folder / INDEX_FILE, files) if many else needed
    for file in tqdm(needed, desc=f"fetching {name}", unit="file"):
        hf_hub_download(name, file, revision=folder.name)  # of one commit, though its branch may move on meanwhile
    return folder


def find_cached_checkpoint(name: str, revision: str | None, why: Exception) -> Path:
    """What the cache has of a repository that the hub does not give now."""
    from huggingface_hub import snapshot_download

    try:
        # Asked for its config alone: what is missing of the rest is told by name when it is opened.
        return Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=["config.json"]))
    except (OSError, ValueError) as e:
        at = "" if revision is None else f" at revision {revision!r}"
        raise CheckpointError(
            f"{name}{at}: neither a folder here nor to be had from the hub, and not in its cache: "
            f"{type(why).__name__}: {why}. Offline? Load it once with a network, unset HF_HUB_OFFLINE, or give the "
            f"path of a folder"
        ) from e


def select_weight_files(files: Iterable[str], name: str) -> list[str]:
    """The file of the weights, or their index; CheckpointError for a repository without a GLM in safetensors."""
    if "config.json" not in files:
        raise CheckpointError(f"{name}: the repository has no config.json; glmlens opens checkpoints of transformers")
    for weights in (WEIGHTS_FILE, INDEX_FILE):
        if weights in files:
            return [weights]
    other = sorted(file for file in files if file.endswith((".bin", ".pt", ".pth", ".gguf", ".safetensors")))
    raise CheckpointError(
        f"{name}: the repository has no {WEIGHTS_FILE} and no {INDEX_FILE}, but {', '.join(other[:3]) or 'no weights'}: glmlens "
        f"opens safetensors only, never pickle, and downloaded nothing. Look for a conversion (for GLM, a name that "
        f"ends in -hf), or save one with transformers: from_pretrained({name!r}).save_pretrained('folder')"
    )


def list_shards(index: Path, files: Iterable[str]) -> list[str]:
    """The files that an index names, those that the repository has; of the others loading will complain."""
    try:
        named = read_json(index)["weight_map"].values()
        return sorted({file for file in named if file in files and file.endswith(".safetensors")})
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{index}: expected a weight_map from tensor names to files: {e}") from e


def explain_refusal(name: str, revision: str | None, why: Any) -> str:
    """What to do about a hub that says no."""
    from huggingface_hub import constants, errors

    page, login = f"{constants.ENDPOINT}/{name}", "type `hf auth login`, or set HF_TOKEN"
    if isinstance(why, errors.HFValidationError):
        return f"{name}: neither a folder here nor a hub id, 'org/name': {why}"
    if isinstance(why, errors.GatedRepoError):
        return f"{name}: gated: ask its owners for access at {page}, then {login}"
    if isinstance(why, errors.RevisionNotFoundError):
        return f"{name}: has no revision {revision!r}; expected a branch, a tag or a commit: see {page}/commits"
    return f"{name}: no such folder here, and no such repository on the hub: see {page}; if it is private, {login}"
