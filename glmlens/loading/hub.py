"""Find the local folder of a checkpoint by path or hub id, downloading only the files that a GLM is loaded from."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from glmlens.config import CheckpointError
from glmlens.file_io import expand_path, read_json

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
SMALL_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"]
SMALL_FILES += ["chat_template.jinja"]  # only these and the weights are downloaded


def find_checkpoint(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """Return the local folder of a checkpoint, given as a folder, or as a hub id whose missing files are downloaded.

    Raises CheckpointError if there is no such folder, or if the hub does not give it.
    """
    folder = expand_path(path_or_hub_id, CheckpointError)
    name = str(path_or_hub_id)
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
    """Return the folder in the hub's cache of a repository at a revision: a branch, a tag or a commit.

    A broken connection resumes where it broke; after any other stop, complete files are not downloaded again.
    HF_TOKEN, HF_HUB_OFFLINE, HF_HUB_CACHE and HF_ENDPOINT have their usual meaning; without a network, the cached files
    are used. Raises CheckpointError with what to type.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        files = {file.rfilename for file in HfApi().model_info(name, revision=revision).siblings or []}
    except (HFValidationError, GatedRepoError, RevisionNotFoundError, RepositoryNotFoundError) as e:
        raise CheckpointError(explain_refusal(name, revision, e)) from e
    except Exception as e:  # depending on its version, huggingface_hub raises errors of requests, httpx or httpx2
        return find_cached_checkpoint(name, revision, e)
    needed = [file for file in SMALL_FILES if file in files] + select_weight_files(files, name)
    try:
        return fetch_files(name, revision, needed, files)
    except CheckpointError:
        raise
    except Exception as e:
        stopped = f"{name}: the download stopped: {type(e).__name__}: {e}"
        raise CheckpointError(f"{stopped}. Load it again to go on: complete files are kept") from e


def fetch_files(name: str, revision: str | None, needed: list[str], files: Iterable[str]) -> Path:
    """Download files one after another and return their folder; a stop loses only the file under way."""
    from huggingface_hub import hf_hub_download

    # The first file also resolves the revision: the name of its folder is the commit.
    many = INDEX_FILE in needed
    folder = Path(hf_hub_download(name, INDEX_FILE if many else "config.json", revision=revision)).parent
    needed = needed + list_shards(folder / INDEX_FILE, files) if many else needed
    for file in tqdm(needed, desc=f"fetching {name}", unit="file"):
        hf_hub_download(name, file, revision=folder.name)  # the same commit, even if the branch moves
    return folder


def find_cached_checkpoint(name: str, revision: str | None, why: Exception) -> Path:
    """Return the cached folder of a repository that the hub did not give; CheckpointError with `why` if none."""
    from huggingface_hub import snapshot_download

    try:
        # Only the config is required here: loading reports other missing files by name.
        return Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=["config.json"]))
    except (OSError, ValueError) as e:
        at = "" if revision is None else f" at revision {revision!r}"
        raise CheckpointError(
            f"{name}{at}: neither a folder here nor available from the hub, and not in its cache: "
            f"{type(why).__name__}: {why}. Offline? Load it once with a network, unset HF_HUB_OFFLINE, or give the "
            f"path of a folder"
        ) from e


def select_weight_files(files: Iterable[str], name: str) -> list[str]:
    """Return the file of the weights, or their index; CheckpointError for a repository without safetensors weights."""
    if "config.json" not in files:
        raise CheckpointError(f"{name}: the repository has no config.json; glmlens opens checkpoints of transformers")
    for weights in (WEIGHTS_FILE, INDEX_FILE):
        if weights in files:
            return [weights]
    other = sorted(file for file in files if file.endswith((".bin", ".pt", ".pth", ".gguf", ".safetensors")))
    found = ", ".join(other[:3]) or "no weights"
    raise CheckpointError(
        f"{name}: the repository has no {WEIGHTS_FILE} and no {INDEX_FILE}, but {found}: glmlens "
        f"opens safetensors only, never pickle, and downloaded nothing. Look for a conversion (for GLM, a name that "
        f"ends in -hf), or save one with transformers: from_pretrained({name!r}).save_pretrained('folder')"
    )


def list_shards(index: Path, files: Iterable[str]) -> list[str]:
    """Return the files that an index names and the repository has; loading reports those that it has not."""
    try:
        named = read_json(index)["weight_map"].values()
        return sorted({file for file in named if file in files and file.endswith(".safetensors")})
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{index}: expected a weight_map from tensor names to files: {e}") from e


def explain_refusal(name: str, revision: str | None, why: Any) -> str:
    """Return the message for a repository that the hub refuses or does not have, with what to type."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{name}"
    login = "type `hf auth login`, or set HF_TOKEN"
    if isinstance(why, errors.HFValidationError):
        return f"{name}: neither a folder here nor a hub id, 'org/name': {why}"
    if isinstance(why, errors.GatedRepoError):
        return f"{name}: gated: ask its owners for access at {page}, then {login}"
    if isinstance(why, errors.RevisionNotFoundError):
        return f"{name}: has no revision {revision!r}; expected a branch, a tag or a commit: see {page}/commits"
    return f"{name}: no such folder here, and no such repository on the hub: see {page}; if it is private, {login}"
