"""Heads of classes: what transformers' heads say, and every instrument on what they say."""

import pytest
import torch
from conftest import HEADED, small_lens, write_checkpoint
from test_loading import TOKENS
from torch.testing import assert_close

import glmlens
from glmlens import analysis, losses, patch, timeline

PAD = 0
LABELS = {"id2label": {0: "bad", 1: "so", 2: "good"}, "label2id": {"bad": 0, "so": 1, "good": 2}}


def classifier(folder, kind, seed=2, dtype=torch.float32, *, glm4=False, **changes):
    """A random classifier as transformers writes it, and transformers' own reading of it."""
    import transformers

    write_checkpoint(folder, seed, glm4=glm4, **changes)
    auto = getattr(transformers, f"AutoModelFor{kind}Classification")
    make = getattr(transformers, f"Glm{4 if glm4 else ''}For{kind}Classification")
    config = transformers.AutoConfig.from_pretrained(folder)
    for name, value in {**LABELS, **changes}.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    model = make(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    (folder / "model.safetensors").unlink()
    model.to(dtype).save_pretrained(folder)
    return auto.from_pretrained(folder, attn_implementation="eager", dtype=dtype).eval()


EDGES = [
    [[5, 6, 7, PAD, PAD]],  # padded on the right
    [[PAD, PAD, 5, 6, 7]],  # on the left
    [[5, PAD, 6, PAD, PAD]],  # the padding's id inside
    [[PAD, PAD, PAD, PAD, PAD]],  # nothing else
    [[5, 6, 7, 8, 9], [5, 6, PAD, PAD, PAD], [PAD, 5, 6, 7, PAD]],
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("glm4", [False, True])
def test_sequences_are_classified_as_transformers_does_bit_for_bit(tmp_path, glm4, dtype):
    theirs = classifier(tmp_path, "Sequence", dtype=dtype, glm4=glm4, pad_token_id=PAD)
    lens = glmlens.load(tmp_path)
    assert (lens.cfg.head, lens.cfg.labels, lens.dtype) == ("sequence", ("bad", "so", "good"), dtype)
    for rows in EDGES:
        tokens = torch.tensor(rows)
        for mask in (None, torch.ones_like(tokens), (tokens != PAD).long()):
            if mask is not None and not mask.any(1).all():
                continue
            positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
            with torch.no_grad():
                expected = theirs(tokens, attention_mask=mask, position_ids=positions).logits
            if mask is None and bool((tokens[:, 0] == PAD).any()):  # padding or a token: only a mask can say
                with pytest.raises(ValueError, match="whether they are padding cannot be seen"):
                    lens.classify(tokens)
                continue
            assert torch.equal(lens.classify(tokens, attention_mask=mask), expected)


@pytest.mark.parametrize(
    ("row", "at"), [([5, 6, 7, 0, 0], 2), ([0, 0, 5, 6, 7], 4), ([5, 0, 6, 0, 0], 2), ([0, 0, 0, 0, 0], 0)]
)
def test_a_sequence_is_read_at_its_right_most_token_that_is_not_padding(row, at):
    logits = torch.randn(1, 5, 3)
    assert torch.equal(losses.pool_last_token(logits, torch.tensor([row]), PAD), logits[:, at])
    assert torch.equal(losses.pool_last_token(logits, None, PAD), logits[:, -1])
    assert torch.equal(losses.pool_last_token(logits, torch.tensor([row]), None), logits[:, -1])
    with pytest.raises(ValueError, match="no pad_token_id"):
        losses.pool_last_token(logits.expand(2, 5, 3), torch.tensor([row, row]), None)


def test_embeddings_are_classified_at_their_last_position(tmp_path):
    theirs = classifier(tmp_path, "Sequence", pad_token_id=PAD)
    lens = glmlens.load(tmp_path)
    embeds = lens.W_E[torch.tensor([[5, 6, PAD, PAD], [3, 4, 5, 6]])]
    with torch.no_grad():
        expected = theirs(inputs_embeds=embeds).logits
    assert torch.equal(lens.classify(inputs_embeds=embeds), expected)


def test_without_an_id_for_padding_sequences_come_one_at_a_time(tmp_path):
    theirs = classifier(tmp_path, "Sequence", pad_token_id=None)
    lens = glmlens.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(lens.classify(TOKENS), theirs(TOKENS).logits)
    for asked in (theirs, lens.classify):
        with pytest.raises(ValueError, match=r"padding token|pad_token_id"):
            asked(TOKENS.expand(2, -1))


SEQUENCE_LABELS = {
    "single": (3, None, torch.tensor([2, 0])),
    "single, as a column": (3, None, torch.tensor([[2], [0]])),
    "single with one ignored": (3, None, torch.tensor([2, -100])),
    "single, said": (3, "single_label_classification", torch.tensor([1, 1])),
    "multiple": (3, None, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])),
    "multiple, said": (3, "multi_label_classification", torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])),
    "regression": (1, None, torch.tensor([0.3, -2.0])),
    "regression of three": (3, "regression", torch.tensor([[0.3, 1.0, 2.0], [-2.0, 0.0, 0.5]])),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", SEQUENCE_LABELS)
def test_the_loss_of_sequences_is_that_of_transformers(tmp_path, case, dtype):
    n, problem, labels = SEQUENCE_LABELS[case]
    labels = labels.to(dtype) if labels.is_floating_point() else labels
    names = {"id2label": {i: str(i) for i in range(n)}, "label2id": {str(i): i for i in range(n)}}
    theirs = classifier(tmp_path, "Sequence", dtype=dtype, pad_token_id=PAD, problem_type=problem, **names)
    lens = glmlens.load(tmp_path)
    tokens = torch.tensor([[5, 6, 7, PAD, PAD], [8, 9, 10, 11, 12]])
    with torch.no_grad():
        expected = theirs(tokens, labels=labels)
    assert torch.equal(lens.classify(tokens), expected.logits)
    assert torch.equal(lens.loss(tokens, labels), expected.loss)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("glm4", [False, True])
def test_tokens_are_classified_as_transformers_does_bit_for_bit(tmp_path, glm4, bias):
    theirs = classifier(tmp_path, "Token", glm4=glm4, token_classification_bias=bias)
    lens = glmlens.load(tmp_path)
    assert (lens.cfg.head, lens.cfg.head_bias) == ("token", bias)
    tokens = TOKENS.reshape(2, 6)
    labels = torch.tensor([[0, 1, 2, -100, 0, -100], [2, 2, 1, 0, -100, 1]])
    with torch.no_grad():
        expected = theirs(tokens, labels=labels)
    assert torch.equal(lens.classify(tokens), expected.logits)
    assert torch.equal(lens.loss(tokens, labels), expected.loss)
    summed = theirs.loss_function(expected.logits, labels, theirs.config, num_items_in_batch=torch.tensor(5))
    assert torch.equal(lens.loss(tokens, labels, num_items=5), summed.detach())


def test_a_checkpoint_without_names_for_its_labels_has_those_of_transformers(tmp_path):
    theirs = classifier(tmp_path, "Sequence", id2label={0: "LABEL_0", 1: "LABEL_1"}, label2id={"LABEL_0": 0})
    assert glmlens.load(tmp_path).cfg.labels == ("LABEL_0", "LABEL_1") == tuple(theirs.config.id2label.values())


def test_what_takes_a_language_model_is_an_error_that_says_so(tmp_path):
    lens = small_lens(**HEADED["sequence"])
    for what in ("generate", "log_probs", "test_prompt", "loss"):
        with pytest.raises(ValueError, match=f"{what}.*head of classes \\(bad, so, good\\)"):
            getattr(lens, what)(TOKENS, *([" x"] if what == "test_prompt" else []))
    with pytest.raises(ValueError, match="head of classes"):
        timeline.record_timeline(lens, TOKENS, max_new_tokens=2)
    with pytest.raises(ValueError, match="no class head"):
        small_lens().classify(TOKENS)
    with pytest.raises(ValueError, match="'fine' is no label of this model: choose from 'bad', 'so', 'good'"):
        lens.to_answer("fine")
    with pytest.raises(ValueError, match="answer 3; this model has 0 to 2"):
        analysis.logit_attribution(lens, TOKENS, 3)


# Every instrument reads class logits.


@pytest.fixture(params=["sequence", "token"])
def judge(request):
    return small_lens(dtype=torch.float64, **HEADED[request.param])


def test_hooks_and_recordings_reach_class_logits(judge):
    logits, acts = judge.run_with_cache(TOKENS, ["resid_post", "logits"])
    assert logits.shape == (1, TOKENS.shape[1], 3)
    assert torch.equal(acts["logits"], logits)
    doubled = judge.classify(TOKENS, hooks={"logits": lambda x, point: 2 * x})
    assert torch.equal(doubled, 2 * judge.classify(TOKENS))
    assert judge.W_U.shape == (judge.cfg.d_model, 3)


@pytest.mark.parametrize("by", ["component", "head", "neuron", "source"])
def test_a_class_logit_is_the_sum_of_what_every_part_adds(judge, by):
    if judge.cfg.head_bias:
        judge.model.unembed.bias[:] = torch.tensor([3.0, -4.0, 5.0])
    found = analysis.logit_attribution(judge, TOKENS, "good", "bad", by=by)
    logits = judge(TOKENS)[0, -1]
    assert_close(torch.tensor(found.total), logits[2] - logits[0])
    assert abs(float(found.unexplained)) < 1e-9
    assert ("bias" in found.rest.labels["part"]) == judge.cfg.head_bias
    assert found.about["direction"] == "good - bad"


def test_the_logit_lens_reads_labels(judge):
    found = analysis.logit_lens(judge, TOKENS, target="good")
    assert set(found.word.values.ravel()) == {"bad", "so", "good"}
    probs = judge(TOKENS)[0].softmax(-1)
    assert_close(torch.tensor(found.target_probability.values[-1]), probs[:, 2])
    assert_close(torch.tensor(found.probability.values[-1]), probs.sort(-1, descending=True).values)


def test_a_sweep_measures_class_logits(judge):
    if judge.cfg.head_bias:
        judge.model.unembed.bias[:] = torch.tensor([3.0, -4.0, 5.0])
    corrupt = TOKENS.clone()
    corrupt[0, 3] = 50
    by_labels = patch.sweep(
        judge, TOKENS, corrupt, "resid_pre", over=("layer", "pos"), metric=("good", "bad"), normalise=False
    )
    by_hand = patch.sweep(
        judge, TOKENS, corrupt, "resid_pre", over=("layer", "pos"), metric=lambda x: x[:, 2] - x[:, 0], normalise=False
    )
    assert_close(torch.tensor(by_labels.values), torch.tensor(by_hand.values))
    clean = judge.run_with_cache(TOKENS, "blocks.1.resid_pre")[1]["blocks.1.resid_pre"]

    def restore(x, point):
        x[:, 3] = clean[:, 3]
        return x

    patched = judge.run_with_hooks(corrupt, {"blocks.1.resid_pre": restore})[0, -1]
    assert_close(torch.tensor(by_labels.values[1, 3]), patched[2] - patched[0])


def test_gradients_of_a_class_logit_reach_every_point(judge):
    _, acts = judge.run_with_cache(TOKENS, "resid_post", gradients_of=lambda logits: logits[:, -1, 2])
    assert all(bool(x.any()) for x in acts.gradients["resid_post"])
