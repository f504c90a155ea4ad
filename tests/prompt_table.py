"""Every public function that takes a prompt, and kinds of what may be passed to it.

Run by itself it tries what is no prompt, without the type checks of the tests, and prints what was not refused.
"""

import contextlib
import io
import sys
import tempfile

import numpy as np
import torch
from conftest import small_config
from test_text import tokenizer

import glmlens
from glmlens import analysis, cache, circuits, patch, timeline
from glmlens.model import GLM
from glmlens.text.tokenizer import Tokenizer

TEXT = "Mary went to the store, John gave a drink to"
OTHER = "John went to the store, Mary gave a drink to"
WORDS = (" Mary", " John")  # the metric is the difference of their logits
ZERO = patch.Intervention(patch.Site("resid_pre", layer=1), patch.Zero())


def lens_of_words(prefix=True, dtype=torch.float32, **changes):
    """A small model under the tokenizer of a few words, with or without a prefix."""
    torch.manual_seed(0)
    engine = tokenizer(prefix)
    changes = {"vocab_size": engine.get_vocab_size(), "pad_token_id": engine.token_to_id("<|endoftext|>")} | changes
    model = GLM(small_config(**changes))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(10)
    return glmlens.Lens(model.to(dtype), Tokenizer(engine))


def harvested(lens, prompt):
    several = isinstance(prompt, list) and not isinstance(prompt[0], int | np.integer)
    with tempfile.TemporaryDirectory() as folder:
        found = lens.harvest(prompt if several else [prompt], "resid_post", folder)
        return found["resid_post", 1], found.tokens


def printed(lens, prompt):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        lens.test_prompt(prompt, " Mary")
    return said.getvalue()


def values(labelled):
    return torch.as_tensor(np.array(labelled.values))


def pair(lens):
    return {"metric": WORDS, "progress": False, "allow": "no change"}


FUNCTIONS = {
    "lens": lambda lens, p: lens(p),
    "run_with_cache": lambda lens, p: lens.run_with_cache(p, "resid_post")[1]["resid_post"],
    "run_with_hooks": lambda lens, p: lens.run_with_hooks(p, {"blocks.1.attn.z": lambda z, point: 0 * z}),
    "generate": lambda lens, p: lens.generate(p, 3, stop_ids=()).new_tokens,
    "stream": lambda lens, p: torch.stack([step.logits for step in lens.stream(p, 3, stop_ids=())]),
    "loss": lambda lens, p: lens.loss(p),
    "log_probs": lambda lens, p: lens.log_probs(p),
    "test_prompt": printed,
    "harvest": harvested,
    "to_batch": lambda lens, p: lens.to_batch(p)[0],
    "to_tokens": lambda lens, p: lens.to_tokens(p),
    "to_str_tokens": lambda lens, p: lens.to_str_tokens(p),
    "to_labels": lambda lens, p: lens.to_labels(p),
    "roles": lambda lens, p: lens.roles(p),
    "points": lambda lens, p: [point.shape for point in lens.points(p)],
    "check": lambda lens, p: str(lens.check(p, "resid_post")),
    "patch.run": lambda lens, p: patch.run_with_interventions(lens, p, ZERO),
    "patch.generate": lambda lens, p: patch.generate_with_interventions(lens, p, 3, ZERO).new_tokens,
    "patch.timeline": lambda lens, p: timeline.record_timeline(lens, p, 3, stop_ids=()).tokens,
    "patch.evaluate": lambda lens, p: patch.evaluate(lens, p, [[ZERO]], WORDS, progress=False),
    "patch.sweep": lambda lens, p: values(
        patch.sweep(lens, p, OTHER, "resid_pre", over=("layer",), normalise=False, **pair(lens))
    ),
    "patch.sweep's corrupt": lambda lens, p: values(
        patch.sweep(lens, OTHER, p, "resid_pre", over=("layer",), normalise=False, **pair(lens))
    ),
    "patch.check": lambda lens, p: patch.check_sweep(lens, p, OTHER, "resid_pre", over=("layer",), metric=WORDS).cells,
    "patch.attribute": lambda lens, p: values(
        patch.attribution_patch(lens, p, OTHER, "resid_pre", over=("layer",), metric=WORDS)
    ),
    "patch.edges": lambda lens, p: circuits.attribute_edges(lens, p, OTHER, metric=WORDS).scores,
    "circuits.path_patch": lambda lens, p: values(
        circuits.path_patch(lens, p, OTHER, patch.Site("logits"), metric=WORDS, progress=False)
    ),
    "patch.Exact": lambda lens, p: circuits.CircuitEvaluator(lens, p, OTHER, metric=WORDS).tokens,
    "patch.steering": lambda lens, p: patch.fit_steering(lens, p, OTHER).vectors,
    "patch.worlds": lambda lens, p: patch.run_side_by_side(lens, {"one": p, "two": OTHER}, []).logits["one"],
    "patch.Swap": lambda lens, p: patch.Swap.of_prompt(lens, p).tokens,
    "patch.Mean": lambda lens, p: patch.Mean.of_prompts(lens, p).prompts,
    "patch.Resample": lambda lens, p: patch.Resample.of_prompts(lens, p).prompts,
    "patch.rotary.breakage": lambda lens, p: values(
        patch.rotary.breakage(lens, p, {"frozen": patch.rotary.freeze(lens, pair=1)}).loss
    ),
    "analysis.logit_lens": lambda lens, p: values(analysis.logit_lens(lens, p).kl),
    "analysis.logit_attribution": lambda lens, p: values(analysis.logit_attribution(lens, p, " Mary")),
    "analysis.accumulated_residual": lambda lens, p: values(analysis.accumulated_residual(lens, p)),
    "analysis.decomposed_residual": lambda lens, p: values(analysis.decompose_residual(lens, p)),
    "analysis.who_reads": lambda lens, p: values(analysis.cache_reads(lens, p).attention),
    "analysis.attended": lambda lens, p: analysis.sum_attention(lens, p),
    "analysis.leave_one_out": lambda lens, p: values(analysis.leave_one_out(lens, p).kl),
    "analysis.score_parts": lambda lens, p: values(analysis.score_parts(lens, p, 1, 0).part),
    "analysis.distance_profile": lambda lens, p: values(analysis.distance_profile(lens, p).score),
    "analysis.selfcheck": lambda lens, p: len(analysis.selfcheck(lens, p).rows),
}


def ids_of(lens):
    return lens.to_tokens(TEXT)[0].tolist()


def padded(lens):
    """The prompt with two ids of padding before it, and their mask."""
    ids = ids_of(lens)
    return [lens.pad_id] * 2 + ids, [0] * 2 + [1] * len(ids)


def batch_encoding(lens):
    from transformers import BatchEncoding

    return BatchEncoding({"input_ids": [ids_of(lens)], "attention_mask": [[1] * len(ids_of(lens))]}, tensor_type="pt")


PROMPTS = {  # the same prompt, in other ways
    "a list of one text": lambda lens: [TEXT],
    "ids": ids_of,
    "a tuple of ids": lambda lens: tuple(ids_of(lens)),
    "a tensor": lambda lens: torch.tensor(ids_of(lens), dtype=torch.int32),
    "an array": lambda lens: np.array([ids_of(lens)], dtype=np.uint16),
    "numpy integers": lambda lens: list(np.array(ids_of(lens))),
    "rows of tensors": lambda lens: [torch.tensor(ids_of(lens))],
    "a mapping of lists": lambda lens: {"input_ids": ids_of(lens), "attention_mask": [1] * len(ids_of(lens))},
    "a padded mapping": lambda lens: dict(
        zip(("input_ids", "attention_mask"), (torch.tensor([x]) for x in padded(lens)), strict=True)
    ),
    "a padded array": lambda lens: dict(
        zip(("input_ids", "attention_mask"), (np.array([x]) for x in padded(lens)), strict=True)
    ),
    "a BatchEncoding": batch_encoding,
}

NO_PROMPTS = {
    "a set": lambda: {"Mary", "John"},
    "bytes": lambda: b"Mary went",
    "a generator": lambda: (text for text in [TEXT]),
    "a message outside a list": lambda: {"role": "user", "content": TEXT},
    "a row of a dataset": lambda: {"text": TEXT},
    "rows of a dataset": lambda: [{"text": TEXT}],
    "turns of another kind": lambda: [{"from": "human", "value": TEXT}],
    "a message without content": lambda: [{"role": "user"}],
    "texts and ids": lambda: [TEXT, 3],
    "None among texts": lambda: [TEXT, None],
    "truth values": lambda: [True, False],
    "a tensor of truth values": lambda: torch.ones(1, 4, dtype=torch.bool),
    "fractions": lambda: [1.5, 2.0],
    "an array of fractions": lambda: np.array([1.0, 2.0]),
    "texts in lists": lambda: [[TEXT], [TEXT]],
    "a number": lambda: 3,
}


def not_refused():
    """The functions that take what is no prompt, or refuse it with anything but a TypeError that speaks of prompts."""
    lens = lens_of_words()
    lens.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    found = [
        f"{name} of {kind}: {answer}"
        for name, function in FUNCTIONS.items()
        for kind, make in NO_PROMPTS.items()
        if (answer := answer_to(function, lens, make())) is not None
    ]
    kv = lens.new_kv()
    lens(TEXT, kv=kv)
    for text in (b"Mary", ["Mary"], {"text": "Mary"}):
        with contextlib.suppress(TypeError):
            found.append(f"cache.find of {text!r}: {cache.find_entries(lens, kv, text)}")
    return found


def answer_to(function, lens, prompt):
    """None where the prompt is refused as it should be."""
    try:
        return f"taken: {function(lens, prompt)}"
    except TypeError as e:
        known = ("prompt", "token ids are whole numbers", "of a chat")
        return None if any(word in str(e) for word in known) else str(e)
    except Exception as e:
        return f"{type(e).__name__}: {e}"


if __name__ == "__main__":
    wrong = not_refused()
    print("\n".join(wrong))
    sys.exit(bool(wrong))
