"""The shape of a GLM, read from any config.json that transformers 4.x or 5.x writes for `glm` and `glm4`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MOST_LAYERS = 1000  # they are made before the file is seen: the deepest GLM has 92


class CheckpointError(Exception):
    """What lies on disk cannot be opened; the message names the file, what was expected and what was found."""


@dataclass(frozen=True)
class GLMConfig:
    """Everything about a GLM but its weights; sizes in the field's names.

    `d_rotary` channels of each head turn with position, the other `d_head - d_rotary` do not.
    """

    model_type: str
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    rms_eps: float
    rope_theta: float
    d_rotary: int
    qkv_bias: bool
    tied: bool
    sandwich: bool  # norms on the sublayers' outputs too
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    dtype: str | None = None

    @property
    def n_groups(self) -> int:
        """Query heads that share one key-value head."""
        return self.n_heads // self.n_kv_heads

    @staticmethod
    def from_dict(raw: Mapping[str, Any], source: str = "config.json") -> "GLMConfig":
        """The config that `raw`, a parsed config.json, describes; raises CheckpointError naming `source`."""
        return Reader(raw, source).config()


@dataclass(frozen=True)
class Reader:
    """Reads fields of a config.json, each with an error that names it; an absent one has transformers' default."""

    raw: Mapping[str, Any]
    source: str

    def config(self) -> GLMConfig:
        model_type = self.raw.get("model_type")
        if model_type not in ("glm", "glm4"):
            raise self.error(f"model_type is {said(model_type)}; glmlens opens 'glm' and 'glm4'")
        if self.raw.get("quantization_config") is not None:
            raise self.error("the weights are quantised (quantization_config); glmlens needs float weights")
        if (act := self.raw.get("hidden_act", "silu")) not in ("silu", "swish"):
            raise self.error(f"hidden_act is {said(act)}; a GLM has 'silu'")
        d_model, n_heads = self.whole("hidden_size"), self.whole("num_attention_heads")
        d_head = self.whole("head_dim", 128)
        n_kv_heads = self.whole("num_key_value_heads", n_heads if "num_key_value_heads" in self.raw else 2)
        if n_heads % n_kv_heads:
            raise self.error(f"num_attention_heads {n_heads} is not a multiple of num_key_value_heads {n_kv_heads}")
        theta, d_rotary = self.rope(d_head)
        return GLMConfig(
            model_type=model_type,
            d_model=d_model,
            n_layers=self.whole("num_hidden_layers", most=MOST_LAYERS),
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            d_head=d_head,
            d_mlp=self.whole("intermediate_size"),
            d_vocab=self.whole("vocab_size"),
            n_ctx=self.whole("max_position_embeddings", 131072),
            rms_eps=self.number("rms_norm_eps", 1.5625e-07),
            rope_theta=theta,
            d_rotary=d_rotary,
            qkv_bias=self.flag("attention_bias", True),
            tied=self.flag("tie_word_embeddings", False),
            sandwich=model_type == "glm4",
            eos_token_ids=self.ids("eos_token_id") or (151329, 151336, 151338),
            pad_token_id=next(iter(self.ids("pad_token_id")), None),
            dtype=self.raw.get("dtype") or self.raw.get("torch_dtype"),
        )

    def rope(self, d_head: int) -> tuple[float, int]:
        """theta and the number of rotated channels: nested fields (5.x) win over top-level ones (4.x)."""
        nested: dict[str, Any] = {}
        for name in ("rope_scaling", "rope_parameters"):
            stated = self.raw.get(name) or {}
            if not isinstance(stated, Mapping):
                raise self.error(f"{name} is {said(stated)}; expected an object")
            nested |= stated
        kind = nested.get("rope_type", nested.get("type", "default"))
        if kind != "default":
            raise self.error(f"rope_type is {said(kind)}; glmlens turns by 'default' rotary angles only")
        field = Reader({**self.raw, **nested}, self.source)
        factor = field.number("partial_rotary_factor", 0.5)
        d_rotary = int(d_head * factor)
        if d_rotary < 2 or d_rotary % 2 or d_rotary > d_head:
            raise self.error(f"partial_rotary_factor {factor} turns {d_rotary} of {d_head} channels, not pairs of them")
        return field.number("rope_theta", 10000.0), d_rotary

    def whole(self, name: str, default: int | None = None, most: int = (1 << 31) - 1) -> int:
        value = default if self.raw.get(name) is None else self.raw[name]
        if value is None:
            raise self.error(f"{name} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise self.error(f"{name} is {said(value)}; expected a whole number from 1 to {most:,}")
        return int(value)

    def number(self, name: str, default: float) -> float:
        value = default if self.raw.get(name) is None else self.raw[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise self.error(f"{name} is {said(value)}; expected a number above 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = default if self.raw.get(name) is None else self.raw[name]
        if not isinstance(value, bool):
            raise self.error(f"{name} is {said(value)}; expected true or false")
        return value

    def ids(self, name: str) -> tuple[int, ...]:
        """The token ids of a field that holds none, one or several."""
        value = self.raw.get(name)
        listed = () if value is None else tuple(value) if isinstance(value, list) else (value,)
        if not all(isinstance(i, int) and not isinstance(i, bool) and abs(i) < 1 << 31 for i in listed):
            raise self.error(f"{name} is {said(value)}; expected a token id, a list of them, or null")
        return listed

    def error(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {why}")


def said(value: Any) -> str:
    """What a file says, in as many letters as an error has room for."""
    try:
        return f"{value!r:.80}"
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of thousands of digits"
