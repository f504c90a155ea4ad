"""Load a GLM from a folder; where the file has a parameter's rows, the parameter is a view of the memory-mapped file.

Tensors are read and placed one at a time: with another dtype or device, at most one is in memory twice.
"""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from glmlens import file_io
from glmlens.config import CheckpointError, GLMConfig
from glmlens.loading.formats import BASE_PREFIX, list_unused_tensors, map_tensor_names, reorder_rotary_rows
from glmlens.model import GLM

FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_HEADER_BYTES = MAX_TEXT_BYTES = (
    4_000_000  # bytes: GLM-4-9B has 35,000; parsing JSON takes up to 30 times its size in memory
)
MAX_TOKENIZER_BYTES = 64_000_000


def load_model(
    folder: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    attention: str = "eager",
    rope_theta: float | int | None = None,
    untie: bool = False,
) -> GLM:
    """Return the GLM in `folder`, without gradients. On the meta device only its config is read.

    `rope_theta` replaces the config's. With `untie`, a tied embedding is copied and the unembedding stays a view of the
    file. Config and tensor headers are checked before any tensor is read. Raises CheckpointError that names the file,
    the tensor, what was expected and what was found.
    """
    # The config, and from it a model of which only the shapes exist.
    device = torch.device(device)
    cfg = GLMConfig.from_dict(read_json(folder / "config.json"), str(folder / "config.json"))
    cfg = with_rope_theta(cfg, rope_theta, folder)
    if dtype is None and cfg.dtype is not None:
        dtype = parse_dtype(cfg.dtype, f"{folder / 'config.json'}: ")
    model = build_meta_model(cfg, attention, dtype or torch.float32)
    if device.type == "meta":
        return build_meta_model(replace(cfg, tied=False), attention, model.ln_final.weight.dtype) if untie else model

    # Headers: every tensor must be in one file, in the shape that this model gives it.
    files = map_tensor_files(folder)
    ours = map_checkpoint_tensors(model)
    if not any(name in files for name in ours):  # a checkpoint of the model without a head: its names have no prefix
        ours = {name.removeprefix(BASE_PREFIX): parts for name, parts in ours.items()}
    shapes = {name: get_expected_shape(parts, model) for name, parts in ours.items()}
    locations = check_tensor_index(files, expected=shapes, ignored=list_ignored_tensors(cfg), cfg=cfg)
    # Without a dtype in arguments and config, that of the embedding.
    dtype = dtype or FLOAT_DTYPES[locations[next(iter(ours))][1]]
    # Numbers: file by file, tensor by tensor.
    size = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    with tqdm(total=size, desc=f"loading {folder.name}", unit="B", unit_scale=True, delay=2) as bar:
        for path in dict.fromkeys(path for path, _ in locations.values()):
            identity = identity_of(path)
            with open_weights(path) as file:
                for name in (name for name in ours if locations[name][0] == path):
                    stored = file.get_tensor(name)
                    x = stored.to(device, dtype)
                    refuse_overflow(stored, x, f"{path}: tensor {name!r}")
                    if x is stored:  # neither converted nor moved: parameters become views of the file
                        MAPPED.setdefault(model, {})[path] = identity
                    bar.update(place_tensor(model, x, ours[name]))
                    del stored, x  # or they would be alive while the next tensor is read
    if cfg.tied:
        model.unembed.weight = model.embed.weight
        check_tied_unembedding(locations, map_tensor_names(cfg))
    if untie and cfg.tied:
        # Copy the embedding and not the unembedding: looking rows up gives the same bits wherever they are in memory,
        # while a matrix product may round differently.
        model.embed.weight = nn.Parameter(model.embed.weight.detach().clone(), requires_grad=False)
        model.cfg = replace(cfg, tied=False)
    return model


Identity = tuple[int, int, int]
MAPPED: WeakKeyDictionary[GLM, dict[Path, Identity]] = WeakKeyDictionary()
"""For every model, the files that its parameters are views of, as they were when opened. A copied model has none."""


def identity_of(path: Path) -> Identity:
    """Return inode, size and time of modification of a file; CheckpointError if it does not exist."""
    try:
        at = path.stat()
    except OSError as e:
        raise CheckpointError(f"{path}: not found: {e}") from e
    return at.st_ino, at.st_size, at.st_mtime_ns


def refuse_rewritten_files(model: GLM) -> None:
    """Raise CheckpointError if a file that parameters are views of was modified in place since it was opened.

    If it was replaced by another file or deleted, the views keep the old content, and a warning is given once.
    """
    for path, before in list(MAPPED.get(model, {}).items()):
        try:
            now = identity_of(path)
        except CheckpointError:
            now = (0, 0, 0)
        # The same inode with another size or time: the mapped pages themselves have changed.
        if now[0] == before[0] and now != before:
            raise CheckpointError(
                f"{path}: was written to since it was opened ({before[1]:,} bytes then, {now[1]:,} now), and this "
                f"model is a view of it: load it again. To replace a file under a model, write another and rename it"
            )
        if now[0] != before[0]:
            del MAPPED[model][path]
            change = "was replaced by another file" if now[0] else "is no longer there"
            warnings.warn(f"{path}: {change}; this model goes on with the one it was opened from", stacklevel=4)


def refuse_overflow(stored: Tensor, x: Tensor, where: str) -> None:
    """Raise CheckpointError if finite numbers of `stored` are infinite in `x`, the same tensor in float16."""
    if x.dtype == torch.float16 and stored.dtype != torch.float16 and bool(x.isinf().any()):
        count = int((x.isinf() & stored.to(x.device).isfinite()).sum())
        if count:
            raise CheckpointError(
                f"{where}: {count:,} of its {x.numel():,} numbers are beyond {torch.finfo(x.dtype).max:,.0f}, where "
                f"float16 ends: load with dtype='bfloat16' or 'float32'"
            )


def with_rope_theta(cfg: GLMConfig, rope_theta: float | int | None, folder: Path) -> GLMConfig:
    """Return the config with `rope_theta`, or with its own; warn if its own is likely a mistake of a conversion.

    transformers' conversion of GLM-4-9B wrote theta 10,000 for every original, whose rope_ratio is 500 in glm-4-9b-chat
    and 10,000 in glm-4-9b-chat-1m. Raises CheckpointError for a theta that is no frequency base.
    """
    if rope_theta is not None:
        least = 1 if cfg.rope_scaling.kind == "yarn" else 0
        if not least < rope_theta < float("inf"):
            raise CheckpointError(f"rope_theta is {rope_theta}; expected a number above {least}")
        return replace(cfg, rope_theta=float(rope_theta))
    if cfg.model_type == "glm" and cfg.n_ctx >= 131072 and cfg.rope_theta == 10000.0:
        right = "1e8" if cfg.n_ctx >= 1 << 20 else "5e6"
        warnings.warn(
            f"{folder / 'config.json'}: rope_theta is 10000 for {cfg.n_ctx:,} positions, and is used; conversions of "
            f"GLM-4-9B-chat lost the original's {right}: load(..., rope_theta={right}) if this is one, "
            f"rope_theta=1e4 if not",
            stacklevel=4,
        )
    return cfg


def check_tied_unembedding(locations: "TensorLocations", names: dict[str, list[str]]) -> None:
    """Raise CheckpointError if a tied checkpoint has an unembedding that differs from its embedding."""
    # The names of both in this format.
    embed, unembed = (next(n for n, ours in names.items() if ours == [f"{end}.weight"]) for end in ("embed", "unembed"))
    if embed in locations and unembed in locations:
        with open_weights(locations[embed][0]) as one, open_weights(locations[unembed][0]) as other:
            if not torch.equal(one.get_tensor(embed), other.get_tensor(unembed)):
                raise CheckpointError(
                    f"{locations[unembed][0]}: tensor {unembed!r} is not the embedding, but tie_word_embeddings is true"
                )


def build_meta_model(cfg: GLMConfig, attention: str, dtype: torch.dtype) -> GLM:
    """Return a GLM on the meta device, with shapes and without numbers or gradients."""
    try:
        with torch.device("meta"), SkipInitialisation():
            return GLM(cfg, attention).to(dtype).requires_grad_(False).eval()
    except RuntimeError as e:
        raise CheckpointError(f"config.json: no model can have these sizes: {e}: {cfg}") from e


class SkipInitialisation(TorchFunctionMode):
    """A context in which initialisers do nothing: on the meta device they fill nothing, and take torch 2 s to do so."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        initialises = getattr(func, "__module__", None) == nn.init.__name__
        return None if initialises else func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class ParameterRows:
    """The rows of one of our parameters that a tensor of a checkpoint holds."""

    name: str
    start: int
    rows: int


def map_checkpoint_tensors(model: GLM) -> dict[str, list[ParameterRows]]:
    """Return the tensors that a checkpoint of this model has, the embedding first, and the rows of ours in each.

    If several tensors make up one of our parameters, each has an equal share of its rows, in the order of the table.
    """
    # named_parameters lists a tied unembedding once, as the embedding.
    n_rows = {name: p.shape[0] for name, p in model.named_parameters()}
    table = {theirs: names for theirs, names in map_tensor_names(model.cfg).items() if n_rows.keys() >= set(names)}
    n_shares = Counter(name for names in table.values() for name in names)
    start = Counter[str]()
    tensors: dict[str, list[ParameterRows]] = {}
    for theirs, names in table.items():
        tensors[theirs] = [ParameterRows(name, start[name], n_rows[name] // n_shares[name]) for name in names]
        start.update({part.name: part.rows for part in tensors[theirs]})
    return tensors


def get_expected_shape(parts: list[ParameterRows], model: GLM) -> tuple[int, ...]:
    """Return the shape of a checkpoint's tensor that holds these rows."""
    return (sum(part.rows for part in parts), *model.get_parameter(parts[0].name).shape[1:])


def list_ignored_tensors(cfg: GLMConfig) -> set[str]:
    """Return the names of tensors that may exist and are not read: a tied unembedding, and computed constants."""
    return {
        theirs for theirs, ours in map_tensor_names(cfg).items() if cfg.tied and ours == ["unembed.weight"]
    } | list_unused_tensors(cfg)


def place_tensor(model: GLM, x: Tensor, parts: list[ParameterRows]) -> int:
    """Put the rows of a checkpoint's tensor in our parameters, and return its size in bytes.

    A parameter whose rows are all in this tensor becomes a view of it; of others, the rows are copied.
    """
    for part, rows in zip(parts, x.split([part.rows for part in parts]), strict=True):
        rows = reorder_rotary_rows(rows, part.name, model.cfg)
        parameter = model.get_parameter(part.name)
        if part.rows == len(parameter):
            set_parameter(model, part.name, rows)
            continue
        if parameter.is_meta:  # the first of several tensors that make it up
            set_parameter(model, part.name, torch.empty(parameter.shape, dtype=x.dtype, device=x.device))
        model.get_parameter(part.name)[part.start : part.start + part.rows] = rows
    return x.nbytes


def set_parameter(model: GLM, name: str, value: Tensor) -> None:
    """Replace a parameter of the model by one of these numbers, without gradients."""
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, nn.Parameter(value, requires_grad=False))


TensorShapes = dict[str, tuple[int, ...]]
TensorLocations = dict[str, tuple[Path, str]]


def check_tensor_index(
    files: dict[str, Path], expected: TensorShapes, ignored: set[str], cfg: GLMConfig
) -> TensorLocations:
    """Return the file and dtype of every expected tensor; CheckpointError if tensors or shapes differ from these."""
    locations: TensorLocations = {}
    for path in dict.fromkeys(files.values()):
        with open_weights(path) as file:
            present = list(file.keys())
            for name in present:
                # A tensor that the model has no place for would be lost: refuse it.
                if name not in expected and name not in ignored:
                    raise CheckpointError(f"{path}: tensor {name!r} has no place in this {cfg.model_type!r}")
                if files.get(name) != path and name in expected:
                    raise CheckpointError(f"{path}: tensor {name!r} is here too, beside the one in {files.get(name)}")
                header = file.get_slice(name)
                shape, dtype = tuple(header.get_shape()), header.get_dtype()
                if shape != expected.get(name, shape):
                    raise CheckpointError(f"{path}: tensor {name!r}: expected shape {expected[name]}, found {shape}")
                if dtype not in FLOAT_DTYPES:
                    raise CheckpointError(
                        f"{path}: tensor {name!r}: expected one of {', '.join(FLOAT_DTYPES)}, found {dtype}; "
                        f"glmlens does not open quantised weights"
                    )
                locations[name] = path, dtype
            for name in (name for name, at in files.items() if at == path and name not in present):
                raise CheckpointError(f"{path}: tensor {name!r}: expected here by the index, not found")
    missing = [name for name in expected if name not in locations]
    if missing:
        where = ", ".join(str(path) for path in dict.fromkeys(files.values()))
        raise CheckpointError(f"{where}: {len(missing)} tensors not found, of which the first is {missing[0]!r}")
    return locations


def map_tensor_files(folder: Path) -> dict[str, Path]:
    """Return the file of every tensor, from the one file of weights or from the index of several."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        with open_weights(single) as file:
            return dict.fromkeys(file.keys(), single)
    if not index.exists():
        other = sorted(path.name for path in folder.glob("*.bin"))
        hint = f" There is {other[0]}: glmlens opens safetensors only, never pickle." if other else ""
        raise CheckpointError(f"{folder}: found neither model.safetensors nor model.safetensors.index.json.{hint}")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{index}: expected a weight_map from tensor names to files, found {shards!r:.80}")
    for name, shard in shards.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index}: tensor {name!r} is in {shard!r}, which is not a file of this folder")
        if not (folder / shard).is_file():
            raise CheckpointError(f"{index}: tensor {name!r} is in {shard!r}, which does not exist")
    return {name: folder / shard for name, shard in shards.items()}


@contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """Open a safetensors file, memory-mapped; problems with it are raised as CheckpointError."""
    with file_io.open_safetensors(path, MAX_HEADER_BYTES, CheckpointError) as file:
        yield file


def check_regular_file(path: Path, max_bytes: int | None = None) -> None:
    """Raise CheckpointError if `path` is no regular file, or one of more than `max_bytes`."""
    file_io.refuse_strange(path, max_bytes, CheckpointError)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises CheckpointError."""
    try:
        return file_io.read_json(path, MAX_TEXT_BYTES, MAX_TEXT_BYTES, CheckpointError)
    except FileNotFoundError as e:
        raise CheckpointError(f"{path}: not found") from e


def parse_dtype(dtype: str | torch.dtype, where: str = "") -> torch.dtype:
    """Return the float dtype of a name, "bfloat16" or "torch.bfloat16", or of a dtype. Raises CheckpointError."""
    parsed = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(parsed, torch.dtype) or parsed not in FLOAT_DTYPES.values():
        names = ", ".join(str(f).removeprefix("torch.") for f in FLOAT_DTYPES.values())
        raise CheckpointError(f"{where}dtype is {dtype!r}; expected one of {names}")
    return parsed
