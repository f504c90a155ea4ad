"""The shape of a GLM, read from the config.json of every format that glmlens opens, by transformers 4.x or 5.x."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

MANY = 1e6  # by which no context is stretched
MOST_LAYERS = 1000  # they are made before the file is seen: the deepest GLM has 92


class CheckpointError(Exception):
    """What lies on disk cannot be opened; the message names the file, what was expected and what was found."""


@dataclass(frozen=True)
class Scaling:
    """By which rule of `rope` pairs of channels turn slower than trained, and its numbers.

    `context` is how many positions were trained on. Pairs that turn more than `fast` times in it stay, those that turn
    less than `slow` times are slower by `factor`. cos and sin are larger by `attention`, where None leaves it to the
    rule. With `truncate`, the first and last of the pairs between are whole numbers.
    """

    kind: str = "default"
    factor: float = 1.0
    context: int = 0
    slow: float = 1.0
    fast: float = 32.0
    attention: float | None = None
    truncate: bool = True


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
    head: str = field(default="vocab", repr=False)  # what reads the final norm; see HEADS
    labels: tuple[str, ...] = field(default=(), repr=False)  # of a class head
    head_bias: bool = field(default=False, repr=False)
    problem_type: str | None = field(default=None, repr=False)
    rope_scaling: Scaling = field(default=Scaling(), repr=False)

    @property
    def d_logits(self) -> int:
        """How many things a position can say: the vocabulary, or the labels of a class head; 0 without a head."""
        return {"vocab": self.d_vocab, "none": 0}.get(self.head, len(self.labels))

    @property
    def n_groups(self) -> int:
        """Query heads that share one key-value head."""
        return self.n_heads // self.n_kv_heads

    @staticmethod
    def from_dict(raw: Mapping[str, Any], source: str = "config.json") -> "GLMConfig":
        """The config that `raw`, a parsed config.json, describes; raises CheckpointError naming `source`."""
        return Reader(raw, source).config()


HEADS = {"ForSequenceClassification": "sequence", "ForTokenClassification": "token"}
PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")
GLM_DEFAULTS = {
    "head_dim": 128, "num_key_value_heads": 2, "max_position_embeddings": 131072, "rms_norm_eps": 1.5625e-07,
    "attention_bias": True, "partial_rotary_factor": 0.5, "eos_token_id": (151329, 151336, 151338),
}  # fmt: skip
LLAMA_DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
CHATGLM_DEFAULTS = {
    "head_dim": 128, "num_key_value_heads": 1, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "attention_bias": False,
}  # fmt: skip
CHATGLM_SPELLING = {
    "vocab_size": "padded_vocab_size", "num_hidden_layers": "num_layers", "intermediate_size": "ffn_hidden_size",
    "head_dim": "kv_channels", "num_key_value_heads": "multi_query_group_num", "attention_bias": "add_qkv_bias",
    "max_position_embeddings": "seq_length", "rms_norm_eps": "layernorm_epsilon",
}  # fmt: skip
SCALINGS: dict[str, dict[str, str]] = {  # what config.json calls the numbers of each rule
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor", "context": "original_max_position_embeddings",
        "slow": "low_freq_factor", "fast": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor", "context": "original_max_position_embeddings", "slow": "beta_slow", "fast": "beta_fast",
        "attention": "attention_factor", "truncate": "truncate",
    },
}  # fmt: skip
CHATGLM_ONLY = {
    "position_encoding_2d": (False, False, "this is the first ChatGLM-6B, of another kind: LayerNorm, two positions"),
    "multi_query_attention": (True, False, "each head's query, key and value rows lie together, as in no release"),
    "rmsnorm": (True, True, "a GLM has RMSNorm"),
    "post_layer_norm": (True, True, "a GLM has a norm before its unembedding"),
    "apply_residual_connection_post_layernorm": (False, False, "a GLM adds to the stream that the norm reads"),
    "add_bias_linear": (False, False, "a GLM has biases on q, k and v alone"),
    "fp32_residual_connection": (False, False, "a GLM's residual stream is in the model's dtype"),
    "quantization_bit": (0, 0, "the weights are quantised; glmlens needs float weights"),
    "pre_seq_len": (None, None, "glmlens has no prefix encoder"),
}


@dataclass(frozen=True)
class Fields:
    """How a format's config.json differs: spellings, what an absent field means, and what must be as it is in a GLM.

    `only` holds the value that is needed, what an absent field means, and why. `qkv_bias` and `rotated`, the part of a
    head that turns, are None where a field says. `rope_ratio`: theta is 10000 times the field of that name.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    spelling: Mapping[str, str] = field(default_factory=dict)
    only: Mapping[str, tuple[Any, Any, str]] = field(default_factory=dict)
    qkv_bias: bool | None = None
    rotated: float | None = None
    rope_ratio: bool = False


FORMATS = {
    "glm": Fields(GLM_DEFAULTS),
    "glm4": Fields(GLM_DEFAULTS),
    "chatglm": Fields(CHATGLM_DEFAULTS, CHATGLM_SPELLING, CHATGLM_ONLY, rotated=0.5, rope_ratio=True),
    "llama": Fields(
        LLAMA_DEFAULTS,
        only={
            "attention_bias": (False, False, "it would give attention's output a bias, which a GLM has not got"),
            "mlp_bias": (False, False, "a GLM's MLP has no biases"),
        },
        qkv_bias=False,
        rotated=1.0,
    ),
    "qwen2": Fields(
        {**LLAMA_DEFAULTS, "max_position_embeddings": 32768},
        only={"use_sliding_window": (False, False, "a GLM's attention reaches all the way back")},
        qkv_bias=True,
        rotated=1.0,
    ),
}


@dataclass(frozen=True)
class Reader:
    """Reads fields of a config.json, each with an error that names it; an absent one has transformers' default."""

    raw: Mapping[str, Any]
    source: str
    format: Fields = Fields()

    def config(self) -> GLMConfig:
        model_type = self.raw.get("model_type")
        if not isinstance(model_type, str) or model_type not in FORMATS:
            raise self.error(f"model_type is {said(model_type)}; glmlens opens {', '.join(map(repr, FORMATS))}")
        return replace(self, format=FORMATS[model_type]).of_format(model_type)

    def of_format(self, model_type: str) -> GLMConfig:
        if self.raw.get("quantization_config") is not None:
            raise self.error("the weights are quantised (quantization_config); glmlens needs float weights")
        if (act := self.raw.get("hidden_act", "silu")) not in ("silu", "swish"):
            raise self.error(f"hidden_act is {said(act)}; a GLM has 'silu'")
        self.refuse_what_no_glm_has()
        d_model, n_heads, default = self.whole("hidden_size"), self.whole("num_attention_heads"), self.format.defaults
        d_head = self.whole("head_dim", default.get("head_dim", max(1, d_model // n_heads)))
        n_kv_heads = self.whole("num_key_value_heads", self.kv_heads_unless_stated(n_heads))
        if n_heads % n_kv_heads:
            stated = f"{self.spelt('num_attention_heads')} {n_heads}"
            raise self.error(f"{stated} is not a multiple of {self.spelt('num_key_value_heads')} {n_kv_heads}")
        n_ctx, fixed = self.whole("max_position_embeddings", default["max_position_embeddings"]), self.format.qkv_bias
        theta, d_rotary, scaling = self.rope(d_head, n_ctx)
        head = self.head(model_type)
        labels = self.labels() if head in HEADS.values() else ()
        return GLMConfig(
            model_type=model_type,
            d_model=d_model,
            n_layers=self.whole("num_hidden_layers", most=MOST_LAYERS),
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            d_head=d_head,
            d_mlp=self.whole("intermediate_size"),
            d_vocab=self.whole("vocab_size"),
            n_ctx=n_ctx,
            rms_eps=self.number("rms_norm_eps", default["rms_norm_eps"]),
            rope_theta=theta,
            d_rotary=d_rotary,
            qkv_bias=self.flag("attention_bias", default["attention_bias"]) if fixed is None else fixed,
            tied=self.flag("tie_word_embeddings", False) and head == "vocab",
            sandwich=model_type == "glm4",
            eos_token_ids=self.ids("eos_token_id") or default.get("eos_token_id", ()),
            pad_token_id=next(iter(self.ids("pad_token_id")), None),
            dtype=self.raw.get("dtype") or self.raw.get("torch_dtype"),
            head=head,
            labels=labels,
            head_bias=head == "token" and self.flag("token_classification_bias", True),
            problem_type=self.one_of("problem_type", PROBLEMS) if labels else None,
            rope_scaling=scaling,
        )

    def refuse_what_no_glm_has(self) -> None:
        for name, (needed, unsaid, why) in self.format.only.items():
            if (found := unsaid if self.raw.get(name) is None else self.raw[name]) != needed:
                raise self.error(f"{name} is {said(found)}, expected {needed!r}: {why}")
        kinds = self.raw.get("layer_types") or ["full_attention"]
        if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
            raise self.error(f"layer_types is {said(kinds)}; every layer of a GLM has 'full_attention'")

    def kv_heads_unless_stated(self, n_heads: int) -> int:
        """A field that is null says: as many as heads; one that is absent says what the format's class says."""
        said = self.spelt("num_key_value_heads") in self.raw
        return n_heads if said else self.format.defaults.get("num_key_value_heads", n_heads)

    def rope(self, d_head: int, n_ctx: int) -> tuple[float, int, Scaling]:
        """theta, the number of rotated channels and the scaling: nested fields win over top-level ones.

        Of the nested ones transformers 4.x writes `rope_scaling` and 5.x `rope_parameters`; the first wins, as there.
        """
        name = "rope_scaling" if self.raw.get("rope_scaling") else "rope_parameters"
        nested = self.raw.get(name) or {}
        if not isinstance(nested, Mapping):
            raise self.error(f"{name} is {said(nested)}; expected an object")
        if several := next((key for key, value in nested.items() if isinstance(value, Mapping)), None):
            raise self.error(f"{name} has an object of its own for {several!r}; the layers of a GLM all turn alike")
        field, fixed = replace(self, raw={**self.raw, **nested}), self.format.rotated
        name = "partial_rotary_factor"
        if fixed is None and nested.get(name, 1.0) is None:
            raise self.error(
                f"{name} is null among the rotary fields, where transformers computes nothing; take it out"
            )
        null = name in field.raw and field.raw[name] is None  # at the top, transformers reads null as all channels
        factor = field.number(name, fixed or (1.0 if null else self.format.defaults[name]))
        if fixed not in (None, factor):
            raise self.error(f"partial_rotary_factor is {factor}; in this format it is always {fixed}")
        d_rotary = int(d_head * factor)
        if d_rotary < 2 or d_rotary % 2 or d_rotary > d_head:
            raise self.error(f"partial_rotary_factor {factor} turns {d_rotary} of {d_head} channels, not pairs of them")
        ratio = self.format.rope_ratio
        theta = 10000.0 * self.number("rope_ratio", 1.0, most=1e12) if ratio else field.number("rope_theta", 10000.0)
        top = {name: self.raw[name] for name in self.raw.keys() & {"original_max_position_embeddings"}}
        scaling = replace(self, raw={**nested, **top}).scaling(n_ctx)
        if scaling.kind == "yarn" and theta <= 1:
            raise self.error(f"rope_theta is {theta}; with 'yarn' expected a number above 1")
        return theta, d_rotary, scaling

    def scaling(self, n_ctx: int) -> Scaling:
        """The rule by which pairs turn slower than trained, the same for prompts of every length."""
        kind = self.raw.get("rope_type", self.raw.get("type", "default"))
        if kind == "dynamic":
            why = "rope_type 'dynamic' turns every token by the length of the prompt, and glmlens by its position alone"
            raise self.error(f"{why}; take it out of config.json: up to {n_ctx:,} positions nothing is lost")
        if not isinstance(kind, str) or kind not in SCALINGS:
            raise self.error(f"rope_type is {said(kind)}; glmlens turns by {', '.join(map(repr, SCALINGS))}")
        if kind == "default":
            return Scaling()
        yarn, stated = kind == "yarn", replace(self, format=Fields(spelling=SCALINGS[kind]))
        if kind == "linear":
            return Scaling(kind, stated.number("factor", None, 1.0, MANY))
        context = stated.whole("context", n_ctx)
        factor = stated.number("factor", max(1.0, n_ctx / context) if yarn else None, 1.0, MANY)
        slow = stated.number("slow", 1.0 if yarn else None, 1 / MANY, MANY)
        fast = stated.number("fast", 32.0 if yarn else None, 1 / MANY, MANY)
        if slow >= fast:
            raise self.error(f"{stated.spelt('fast')} is {fast}; expected more than {stated.spelt('slow')}, {slow}")
        if not yarn:
            return Scaling(kind, factor, context, slow, fast)
        return Scaling(kind, factor, context, slow, fast, stated.attention(factor), stated.flag("truncate", True))

    def attention(self, factor: float) -> float | None:
        """What YaRN multiplies cos and sin by, where it is said: itself, or the quotient of two of its formula."""
        if self.raw.get("attention_factor") is not None:
            return self.number("attention", None, 1 / MANY, MANY)
        if not (self.raw.get("mscale") and self.raw.get("mscale_all_dim")):
            return None
        one, all_ = (self.number(name, None, 1 / MANY, MANY) for name in ("mscale", "mscale_all_dim"))
        return (0.1 * one * math.log(factor) + 1.0) / (0.1 * all_ * math.log(factor) + 1.0)

    def head(self, model_type: str) -> str:
        """What reads the final norm, by the name of the class that was saved; a tied embedding is an unembedding."""
        stated = self.raw.get("architectures") or [""]
        name = stated[0] if isinstance(stated, list) else stated
        if not isinstance(name, str):
            raise self.error(f"architectures is {said(stated)}; expected a list of names")
        if model_type == "chatglm":
            if name not in ("", "ChatGLMModel", "ChatGLMForConditionalGeneration"):
                raise self.error(
                    f"architectures says {said(name)}; of 'chatglm' glmlens opens the language model alone"
                )
            return "vocab"
        headless = name.endswith("Model") and not self.flag("tie_word_embeddings", False)
        return next((head for end, head in HEADS.items() if name.endswith(end)), "none" if headless else "vocab")

    def labels(self) -> tuple[str, ...]:
        """The names of the classes in order: transformers writes LABEL_0 and so on where nobody gave any."""
        stated = self.raw.get("id2label")
        if stated is None:
            return tuple(f"LABEL_{i}" for i in range(self.whole("num_labels", 2, most=1 << 20)))
        listed = [stated.get(str(i)) for i in range(len(stated))] if isinstance(stated, Mapping) else []
        if not listed or None in listed:
            raise self.error(f"id2label is {said(stated)}; expected an object from '0', '1', ... to names")
        return tuple(name if isinstance(name, str) else said(name) for name in listed)

    def one_of(self, name: str, known: tuple[str, ...]) -> str | None:
        found = self.raw.get(name)
        if found is not None and found not in known:
            raise self.error(f"{name} is {said(found)}; expected one of {', '.join(known)}, or null")
        return found

    def spelt(self, name: str) -> str:
        """What this format calls a field."""
        return self.format.spelling.get(name, name)

    def value(self, name: str, default: Any) -> tuple[str, Any]:
        """This format's name of a field and its value: where it is absent or null, the default."""
        spelt = self.spelt(name)
        return spelt, default if self.raw.get(spelt) is None else self.raw[spelt]

    def whole(self, name: str, default: int | None = None, most: int = (1 << 31) - 1) -> int:
        name, value = self.value(name, default)
        if value is None:
            raise self.error(f"{name} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise self.error(f"{name} is {said(value)}; expected a whole number from 1 to {most:,}")
        return int(value)

    def number(self, name: str, default: float | None, least: float = 0.0, most: float = sys.float_info.max) -> float:
        name, value = self.value(name, default)
        if value is None:
            raise self.error(f"{name} is missing")
        real = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not real or not 0 < value <= most or value < least:
            limits = f"from {least:g} to {most:,.0f}" if least else "above 0"
            raise self.error(f"{name} is {said(value)}; expected a number {limits}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        name, value = self.value(name, default)
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
