"""The sizes of a GLM, read from the config.json of every format that glmlens opens, of transformers 4.x or 5.x."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from glmlens.errors import GlmlensError

MAX_ROPE_FACTOR = 1e6  # limit of numbers of rope scaling: no published context is stretched so far
MAX_LAYERS = 1000  # layers are built before the weights are opened; the deepest GLM has 92


class CheckpointError(GlmlensError):
    """A checkpoint that cannot be opened; the message names the file, what was expected and what was found."""


@dataclass(frozen=True)
class Scaling:
    """The rope scaling of a model: a rule of `rope` for frequencies below the trained ones, and its numbers.

    `context` is the number of positions trained on. Pairs that make more than `fast` rotations in it keep their
    frequency; the frequency of those that make fewer than `slow` is divided by `factor`. cos and sin are multiplied by
    `attention`, or for None by what the rule computes. With `truncate`, the first and last pair between the two are
    rounded to whole numbers.
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
    """The sizes, options and special tokens of a GLM.

    Rotary position embeddings rotate the first `d_rotary` channels of each head; the other `d_head - d_rotary` are
    unchanged.
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
    sandwich: bool  # norms on the outputs of attention and MLP too (glm4)
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    dtype: str | None = None
    head: str = field(
        default="vocab", repr=False
    )  # after the final norm: "vocab", "none", or a class head of CLASS_HEADS
    labels: tuple[str, ...] = field(default=(), repr=False)  # the class names of a class head
    head_bias: bool = field(default=False, repr=False)
    problem_type: str | None = field(default=None, repr=False)
    rope_scaling: Scaling = field(default=Scaling(), repr=False)

    @property
    def d_logits(self) -> int:
        """The number of logits at a position: the vocabulary, or the labels of a class head; 0 without a head."""
        return {"vocab": self.d_vocab, "none": 0}.get(self.head, len(self.labels))

    @property
    def n_groups(self) -> int:
        """The number of query heads that share one KV head."""
        return self.n_heads // self.n_kv_heads

    @staticmethod
    def from_dict(raw: Mapping[str, Any], source: str = "config.json") -> "GLMConfig":
        """Return the config of `raw`, a parsed config.json; CheckpointError that names `source` if it is no GLM."""
        return ConfigReader(raw, source).read_config()


CLASS_HEADS = {"ForSequenceClassification": "sequence", "ForTokenClassification": "token"}
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
# The values that transformers' config classes have for fields that config.json does not have.
GLM_DEFAULTS = {
    "head_dim": 128, "num_key_value_heads": 2, "max_position_embeddings": 131072, "rms_norm_eps": 1.5625e-07,
    "attention_bias": True, "partial_rotary_factor": 0.5, "eos_token_id": (151329, 151336, 151338),
}  # fmt: skip
LLAMA_DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
CHATGLM_DEFAULTS = {
    "head_dim": 128, "num_key_value_heads": 1, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "attention_bias": False,
}  # fmt: skip
CHATGLM_FIELD_NAMES = {
    "vocab_size": "padded_vocab_size", "num_hidden_layers": "num_layers", "intermediate_size": "ffn_hidden_size",
    "head_dim": "kv_channels", "num_key_value_heads": "multi_query_group_num", "attention_bias": "add_qkv_bias",
    "max_position_embeddings": "seq_length", "rms_norm_eps": "layernorm_epsilon",
}  # fmt: skip
# For every rule of rope scaling: our field of Scaling, and its name in config.json.
ROPE_SCALING_FIELDS: dict[str, dict[str, str]] = {
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
# field: (the value of a GLM, the value that an absent field means, why no other value can be opened)
CHATGLM_REQUIRED = {
    "position_encoding_2d": (
        False,
        False,
        "this is the first ChatGLM-6B, another architecture: LayerNorm, two positions",
    ),
    "multi_query_attention": (
        True,
        False,
        "each head's query, key and value rows would be interleaved, as in no release",
    ),
    "rmsnorm": (True, True, "a GLM has RMSNorm"),
    "post_layer_norm": (True, True, "a GLM has a norm before its unembedding"),
    "apply_residual_connection_post_layernorm": (False, False, "a GLM adds to the residual stream before the norm"),
    "add_bias_linear": (False, False, "a GLM has biases on q, k and v only"),
    "fp32_residual_connection": (False, False, "a GLM's residual stream is in the model's dtype"),
    "quantization_bit": (0, 0, "the weights are quantised; glmlens needs float weights"),
    "pre_seq_len": (None, None, "glmlens has no prefix encoder"),
}


@dataclass(frozen=True)
class ConfigFormat:
    """How the config.json of one format is read.

    `defaults` are the values of absent fields and `field_names` this format's names of fields. `required` maps a field
    to the value of a GLM, the value that an absent field means, and why another cannot be opened. `qkv_bias` and
    `rotary_factor` are None where a field of config.json gives them. With `rope_ratio`, theta is 10000 times the field
    of that name.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    field_names: Mapping[str, str] = field(default_factory=dict)
    required: Mapping[str, tuple[Any, Any, str]] = field(default_factory=dict)
    qkv_bias: bool | None = None
    rotary_factor: float | None = None
    rope_ratio: bool = False


CONFIG_FORMATS = {
    "glm": ConfigFormat(GLM_DEFAULTS),
    "glm4": ConfigFormat(GLM_DEFAULTS),
    "chatglm": ConfigFormat(
        CHATGLM_DEFAULTS, CHATGLM_FIELD_NAMES, CHATGLM_REQUIRED, rotary_factor=0.5, rope_ratio=True
    ),
    "llama": ConfigFormat(
        LLAMA_DEFAULTS,
        required={
            "attention_bias": (False, False, "it would add a bias to the output of attention, and a GLM has none"),
            "mlp_bias": (False, False, "a GLM's MLP has no biases"),
        },
        qkv_bias=False,
        rotary_factor=1.0,
    ),
    "qwen2": ConfigFormat(
        {**LLAMA_DEFAULTS, "max_position_embeddings": 32768},
        required={"use_sliding_window": (False, False, "a GLM's attention reads all earlier positions")},
        qkv_bias=True,
        rotary_factor=1.0,
    ),
}


@dataclass(frozen=True)
class ConfigReader:
    """Reads the fields of a config.json, with transformers' defaults for absent ones.

    Every error is a CheckpointError that names the field, what was found and what was expected.
    """

    raw: Mapping[str, Any]
    source: str
    format: ConfigFormat = ConfigFormat()

    def read_config(self) -> GLMConfig:
        """Return the config of a format that glmlens opens, chosen by `model_type`."""
        model_type = self.raw.get("model_type")
        if not isinstance(model_type, str) or model_type not in CONFIG_FORMATS:
            raise self.make_error(
                f"model_type is {format_value(model_type)}; glmlens opens {', '.join(map(repr, CONFIG_FORMATS))}"
            )
        return replace(self, format=CONFIG_FORMATS[model_type]).read_format(model_type)

    def read_format(self, model_type: str) -> GLMConfig:
        """Return the config, read as `self.format` describes."""
        if self.raw.get("quantization_config") is not None:
            raise self.make_error("the weights are quantised (quantization_config); glmlens needs float weights")
        activation = self.raw.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise self.make_error(f"hidden_act is {format_value(activation)}; a GLM has 'silu'")
        self.refuse_unsupported()
        default = self.format.defaults
        d_model = self.read_integer("hidden_size")
        n_heads = self.read_integer("num_attention_heads")
        d_head = self.read_integer("head_dim", default.get("head_dim", max(1, d_model // n_heads)))
        n_kv_heads = self.read_integer("num_key_value_heads", self.read_default_kv_heads(n_heads))
        if n_heads % n_kv_heads:
            stated = f"{self.get_field_name('num_attention_heads')} {n_heads}"
            raise self.make_error(
                f"{stated} is not a multiple of {self.get_field_name('num_key_value_heads')} {n_kv_heads}"
            )
        n_ctx = self.read_integer("max_position_embeddings", default["max_position_embeddings"])
        qkv_bias = self.format.qkv_bias
        if qkv_bias is None:
            qkv_bias = self.read_flag("attention_bias", default["attention_bias"])
        theta, d_rotary, scaling = self.read_rope(d_head, n_ctx)
        head = self.read_head(model_type)
        labels = self.read_labels() if head in CLASS_HEADS.values() else ()
        return GLMConfig(
            model_type=model_type,
            d_model=d_model,
            n_layers=self.read_integer("num_hidden_layers", maximum=MAX_LAYERS),
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            d_head=d_head,
            d_mlp=self.read_integer("intermediate_size"),
            d_vocab=self.read_integer("vocab_size"),
            n_ctx=n_ctx,
            rms_eps=self.read_number("rms_norm_eps", default["rms_norm_eps"]),
            rope_theta=theta,
            d_rotary=d_rotary,
            qkv_bias=qkv_bias,
            tied=self.read_flag("tie_word_embeddings", False) and head == "vocab",
            sandwich=model_type == "glm4",
            eos_token_ids=self.read_token_ids("eos_token_id") or default.get("eos_token_id", ()),
            pad_token_id=next(iter(self.read_token_ids("pad_token_id")), None),
            dtype=self.raw.get("dtype") or self.raw.get("torch_dtype"),
            head=head,
            labels=labels,
            head_bias=head == "token" and self.read_flag("token_classification_bias", True),
            problem_type=self.read_choice("problem_type", PROBLEM_TYPES) if labels else None,
            rope_scaling=scaling,
        )

    def refuse_unsupported(self) -> None:
        """Raise CheckpointError for a field whose value means something that a GLM does not compute."""
        for name, (needed, default, why) in self.format.required.items():
            value = self.raw.get(name)
            if value is None:
                value = default
            if value != needed:
                raise self.make_error(f"{name} is {format_value(value)}, expected {needed!r}: {why}")
        kinds = self.raw.get("layer_types") or ["full_attention"]
        if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
            raise self.make_error(f"layer_types is {format_value(kinds)}; every layer of a GLM has 'full_attention'")

    def read_default_kv_heads(self, n_heads: int) -> int:
        """Return the number of KV heads where config.json gives none.

        transformers reads null as one KV head per query head, and an absent field as the default of its config class.
        """
        is_null = self.get_field_name("num_key_value_heads") in self.raw
        return n_heads if is_null else self.format.defaults.get("num_key_value_heads", n_heads)

    def read_rope(self, d_head: int, n_ctx: int) -> tuple[float, int, Scaling]:
        """Return theta, the number of rotated channels and the scaling.

        transformers 4.x writes an object `rope_scaling` and 5.x `rope_parameters`; as there, the first is used if both
        are there, and its fields override those at the top level.
        """
        name = "rope_scaling" if self.raw.get("rope_scaling") else "rope_parameters"
        nested = self.raw.get(name) or {}
        if not isinstance(nested, Mapping):
            raise self.make_error(f"{name} is {format_value(nested)}; expected an object")
        layer_kind = next((key for key, value in nested.items() if isinstance(value, Mapping)), None)
        if layer_kind:
            raise self.make_error(
                f"{name} has an object of its own for {layer_kind!r}; the layers of a GLM rotate alike"
            )
        merged = replace(self, raw={**self.raw, **nested})
        fixed = self.format.rotary_factor
        name = "partial_rotary_factor"
        if fixed is None and nested.get(name, 1.0) is None:
            raise self.make_error(
                f"{name} is null among the rotary fields, which transformers cannot compute with; take it out"
            )
        # At the top level, transformers reads null as all channels.
        is_null = name in merged.raw and merged.raw[name] is None
        factor = merged.read_number(name, fixed or (1.0 if is_null else self.format.defaults[name]))
        if fixed not in (None, factor):
            raise self.make_error(f"partial_rotary_factor is {factor}; in this format it is always {fixed}")
        d_rotary = int(d_head * factor)
        if d_rotary < 2 or d_rotary % 2 or d_rotary > d_head:
            raise self.make_error(
                f"partial_rotary_factor {factor} rotates {d_rotary} of {d_head} channels; expected a multiple of 2"
            )
        if self.format.rope_ratio:
            theta = 10000.0 * self.read_number("rope_ratio", 1.0, maximum=1e12)
        else:
            theta = merged.read_number("rope_theta", 10000.0)
        # The scaling is read from the nested fields alone; of the top level's only this one belongs to it.
        top = {name: self.raw[name] for name in self.raw.keys() & {"original_max_position_embeddings"}}
        scaling = replace(self, raw={**nested, **top}).read_rope_scaling(n_ctx)
        if scaling.kind == "yarn" and theta <= 1:
            raise self.make_error(f"rope_theta is {theta}; with 'yarn' expected a number above 1")
        return theta, d_rotary, scaling

    def read_rope_scaling(self, n_ctx: int) -> Scaling:
        """Return the rope scaling of these fields, which must be the same for prompts of every length."""
        kind = self.raw.get("rope_type", self.raw.get("type", "default"))
        if kind == "dynamic":
            why = "rope_type 'dynamic' has frequencies that depend on the length of the prompt, which glmlens has not"
            raise self.make_error(f"{why}; take it out of config.json: up to {n_ctx:,} positions nothing changes")
        if not isinstance(kind, str) or kind not in ROPE_SCALING_FIELDS:
            raise self.make_error(
                f"rope_type is {format_value(kind)}; glmlens has {', '.join(map(repr, ROPE_SCALING_FIELDS))}"
            )
        if kind == "default":
            return Scaling()
        yarn = kind == "yarn"
        # Read by the names that this rule's numbers have in config.json.
        stated = replace(self, format=ConfigFormat(field_names=ROPE_SCALING_FIELDS[kind]))
        if kind == "linear":
            return Scaling(kind, stated.read_number("factor", None, minimum=1.0, maximum=MAX_ROPE_FACTOR))
        context = stated.read_integer("context", n_ctx)
        factor = stated.read_number(
            "factor", max(1.0, n_ctx / context) if yarn else None, minimum=1.0, maximum=MAX_ROPE_FACTOR
        )
        slow = stated.read_number("slow", 1.0 if yarn else None, minimum=1 / MAX_ROPE_FACTOR, maximum=MAX_ROPE_FACTOR)
        fast = stated.read_number("fast", 32.0 if yarn else None, minimum=1 / MAX_ROPE_FACTOR, maximum=MAX_ROPE_FACTOR)
        if slow >= fast:
            raise self.make_error(
                f"{stated.get_field_name('fast')} is {fast}; expected more than {stated.get_field_name('slow')}, {slow}"
            )
        scaling = Scaling(kind=kind, factor=factor, context=context, slow=slow, fast=fast)
        if not yarn:
            return scaling
        attention = stated.read_attention_factor(factor)
        return replace(scaling, attention=attention, truncate=stated.read_flag("truncate", True))

    def read_attention_factor(self, factor: float) -> float | None:
        """Return the factor on cos and sin that the fields of YaRN give; None leaves it to YaRN's own formula.

        They give it as `attention_factor`, or as the quotient of the formula 0.1 m ln(factor) + 1 for two values of m.
        """
        if self.raw.get("attention_factor") is not None:
            return self.read_number("attention", None, minimum=1 / MAX_ROPE_FACTOR, maximum=MAX_ROPE_FACTOR)
        if not (self.raw.get("mscale") and self.raw.get("mscale_all_dim")):
            return None
        mscale, mscale_all_dim = (
            self.read_number(name, None, minimum=1 / MAX_ROPE_FACTOR, maximum=MAX_ROPE_FACTOR)
            for name in ("mscale", "mscale_all_dim")
        )
        return (0.1 * mscale * math.log(factor) + 1.0) / (0.1 * mscale_all_dim * math.log(factor) + 1.0)

    def read_head(self, model_type: str) -> str:
        """Return what follows the final norm, by the name of the class that was saved: see `GLMConfig.head`."""
        stated = self.raw.get("architectures") or [""]
        name = stated[0] if isinstance(stated, list) else stated
        if not isinstance(name, str):
            raise self.make_error(f"architectures is {format_value(stated)}; expected a list of names")
        if model_type == "chatglm":
            if name not in ("", "ChatGLMModel", "ChatGLMForConditionalGeneration"):
                raise self.make_error(
                    f"architectures is {format_value(name)}; of 'chatglm' glmlens opens the language model only"
                )
            return "vocab"
        # A tied embedding is an unembedding, even where the class that was saved has none.
        headless = name.endswith("Model") and not self.read_flag("tie_word_embeddings", False)
        return next((head for end, head in CLASS_HEADS.items() if name.endswith(end)), "none" if headless else "vocab")

    def read_labels(self) -> tuple[str, ...]:
        """Return the names of the classes in order: LABEL_0 and so on, as in transformers, if config.json has none."""
        stated = self.raw.get("id2label")
        if stated is None:
            return tuple(f"LABEL_{i}" for i in range(self.read_integer("num_labels", 2, maximum=1 << 20)))
        listed = [stated.get(str(i)) for i in range(len(stated))] if isinstance(stated, Mapping) else []
        if not listed or None in listed:
            raise self.make_error(f"id2label is {format_value(stated)}; expected an object from '0', '1', ... to names")
        return tuple(name if isinstance(name, str) else format_value(name) for name in listed)

    def read_choice(self, name: str, choices: tuple[str, ...]) -> str | None:
        """Return a field that must be absent, null or one of `choices`."""
        value = self.raw.get(name)
        if value is not None and value not in choices:
            raise self.make_error(f"{name} is {format_value(value)}; expected one of {', '.join(choices)}, or null")
        return value

    def get_field_name(self, name: str) -> str:
        """Return the name of a field in this format."""
        return self.format.field_names.get(name, name)

    def read_value(self, name: str, default: Any) -> tuple[str, Any]:
        """Return the name of a field in this format and its value, `default` if it is absent or null."""
        stated_name = self.get_field_name(name)
        value = self.raw.get(stated_name)
        return stated_name, default if value is None else value

    def read_integer(self, name: str, default: int | None = None, maximum: int = (1 << 31) - 1) -> int:
        """Return a field that must be a whole number from 1 to `maximum`."""
        name, value = self.read_value(name, default)
        if value is None:
            raise self.make_error(f"{name} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= maximum:
            raise self.make_error(f"{name} is {format_value(value)}; expected a whole number from 1 to {maximum:,}")
        return int(value)

    def read_number(
        self, name: str, default: float | None, minimum: float = 0.0, maximum: float = sys.float_info.max
    ) -> float:
        """Return a field that must be a number above 0, from `minimum` to `maximum`."""
        name, value = self.read_value(name, default)
        if value is None:
            raise self.make_error(f"{name} is missing")
        real = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not real or not 0 < value <= maximum or value < minimum:
            limits = f"from {minimum:g} to {maximum:,.0f}" if minimum else "above 0"
            raise self.make_error(f"{name} is {format_value(value)}; expected a number {limits}")
        return float(value)

    def read_flag(self, name: str, default: bool) -> bool:
        """Return a field that must be true or false."""
        name, value = self.read_value(name, default)
        if not isinstance(value, bool):
            raise self.make_error(f"{name} is {format_value(value)}; expected true or false")
        return value

    def read_token_ids(self, name: str) -> tuple[int, ...]:
        """Return the token ids of a field that is null, one id or a list of ids."""
        value = self.raw.get(name)
        if value is None:
            return ()
        listed = tuple(value) if isinstance(value, list) else (value,)
        if not all(isinstance(i, int) and not isinstance(i, bool) and abs(i) < 1 << 31 for i in listed):
            raise self.make_error(f"{name} is {format_value(value)}; expected a token id, a list of them, or null")
        return listed

    def make_error(self, why: str) -> CheckpointError:
        """Return the error for this config.json, with the file's name before `why`."""
        return CheckpointError(f"{self.source}: {why}")


def format_value(value: Any) -> str:
    """Return the repr of a value from a file, cut to 80 characters for an error message."""
    try:
        return f"{value!r:.80}"
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of thousands of digits"
