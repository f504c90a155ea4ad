"""Keywords of other libraries, with what to type here instead, for the TypeError of an unknown keyword."""

import difflib
from collections.abc import Iterable
from typing import TypedDict


class NoKeywords(TypedDict):
    """The type of `**unknown` in a function that takes no other keywords and raises TypeError for them."""


ELSEWHERE = {
    # TransformerLens
    "names_filter": 'names="resid_post", a glob or a list: lens.run_with_cache(prompt, names=...)',
    "name_filter": "names=",
    "fwd_hooks": "hooks={name: fn}, fn(x, point): lens.run_with_hooks(prompt, hooks=...)",
    "bwd_hooks": "run_with_cache(prompt, names, gradients_of=metric), then acts.gradients",
    "incl_bwd": "run_with_cache(prompt, names, gradients_of=metric), then acts.gradients",
    "return_type": "leave it out: a lens returns logits; lens.loss(prompt) and lens.log_probs(prompt) are the loss, "
    "logits=False in run_with_cache leaves the logits out, and a generation has run.text and run.tokens",
    "return_cache_object": "leave it out: run_with_cache returns (logits, acts)",
    "remove_batch_dim": "acts[name][..., 0, :, :], or index the batch axis that acts shows",
    "stop_at_layer": "stop_layer=",
    "start_at_layer": "start_layer=, with a residual stream as the prompt",
    "pos_slice": "logits_to_keep= for the logits, and an index into pos of what was recorded",
    "prepend_bos": "prefix=False in lens.to_tokens(text, prefix=False), which takes the ids without what the tokenizer "
    "puts before a text; a lens takes those ids as a prompt",
    "padding_side": "leave it out: prompts are padded on the left",
    "default_padding_side": "leave it out: prompts are padded on the left",
    "move_to_device": "leave it out: tokens are on lens.device",
    "truncate": "lens.to_tokens(text)[:, :n], which is a prompt",
    "past_kv_cache": "kv=lens.new_kv()",
    "use_past_kv_cache": "leave it out: a generation has a cache, run.kv",
    "reset_hooks_end": "leave it out: a hook lasts for the run that it is passed to",
    "clear_contexts": "leave it out: a hook lasts for the run that it is passed to",
    "stop_at_eos": "stop_ids=(), to go on past the checkpoint's own stop ids",
    "eos_token_id": "stop_ids=",
    "do_sample": "temperature=1.0 to sample; without a temperature it is greedy",
    "freq_penalty": "repetition_penalty=",
    "loss_per_token": "-lens.log_probs(prompt)",
    "per_token": "-lens.log_probs(prompt)",
    "prepend_space_to_answer": 'the space, as it stands in the text: lens.test_prompt(prompt, " Mary")',
    # nnsight
    "remote": "leave it out: a lens runs here",
    "scan": "lens.check(prompt, names, hooks), which runs without numbers",
    "validate": "lens.check(prompt, names, hooks), which runs without numbers",
    "invoker_args": "the prompt, or a list of prompts, as the first argument",
    # transformers
    "input_ids": "the ids as the first argument",
    "inputs": "the prompt as the first argument",
    "tokens": "the ids as the first argument",
    "text": "the text as the first argument",
    "input": "the prompt as the first argument",
    "past_key_values": "kv=lens.new_kv()",
    "use_cache": "kv=lens.new_kv()",
    "output_attentions": 'run_with_cache(prompt, "attn.pattern")',
    "output_hidden_states": 'run_with_cache(prompt, "resid_post")',
    "return_dict": "leave it out: a lens returns logits",
    "labels": "lens.loss(prompt, labels)",
    "max_length": "max_new_tokens=",
    "max_tokens": "max_new_tokens=",
    "min_length": "max_new_tokens= with stop_ids=()",
    "num_return_sequences": "the prompt that often: [prompt] * n",
    "num_beams": "temperature= to sample, or none for greedy: there is no beam search",
    "stop": "stop_strings=",
    "add_special_tokens": "prefix=",
    # this package, in other functions
    "hook": "run_with_hooks(prompt, hooks) or run_with_cache(prompt, names, hooks)",
    "hooks": "run_with_hooks(prompt, hooks) or run_with_cache(prompt, names, hooks)",
    "names": "run_with_cache(prompt, names)",
    "logits": "run_with_cache(prompt, names, logits=False)",
    "kv": "a call of the lens, run_with_cache, run_with_hooks or generate, which take kv=",
    "attention_mask": '{"input_ids": ids, "attention_mask": mask} as the prompt',
}


def refuse_keywords(function: str, unknown: Iterable[str], takes: Iterable[str]) -> None:
    """Raise TypeError for the first of `unknown`, with what to type instead; return if there is none.

    `takes` are the keywords of the function: an unknown one is answered from ELSEWHERE, or with the nearest of them.
    """
    takes = list(takes)
    for name in unknown:
        if name in ELSEWHERE:
            hint = ELSEWHERE[name] if ELSEWHERE[name].startswith("leave") else f"here it is {ELSEWHERE[name]}"
        else:
            near = difflib.get_close_matches(name, takes, 1)
            hint = f"did you mean {near[0]}=?" if near else f"it takes {', '.join(takes)}"
        raise TypeError(f"{function} got an unexpected keyword argument {name!r}: {hint}")
