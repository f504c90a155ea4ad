"""Train the small GLM that is bundled with the package: `python -m glmlens.demo.train OUT`.

One command trains from random weights to a checkpoint folder that transformers opens. It shows the loss, and every 100
steps it saves its state and a checkpoint of the model (OUT/step-0100 and so on: see `demo.history`). A training that
was killed resumes from the last saved state. The same seed gives the same training data; the weights differ in their
last bits between machines.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from jaxtyping import Int
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from glmlens.config import GLMConfig
from glmlens.demo import vocabulary
from glmlens.demo.world import generate_documents
from glmlens.file_io import FileError, expand_path, refuse_strange, write_bytes, write_whole
from glmlens.loading.checkpoint import map_checkpoint_tensors
from glmlens.losses import next_token_loss
from glmlens.model import GLM

SAVE_EVERY = 100  # steps between saved states


@dataclass(frozen=True)
class TrainingConfig:
    """The hyperparameters of the training.

    `pos` is the length of a row in tokens, `constant` the share of the steps before the cosine decay begins. The
    initialisation matters most: with the usual std of 0.02 the loss of such a small model stops falling early.
    """

    steps: int = 2700
    batch: int = 24
    pos: int = 96
    seed: int = 0
    embedding_std: float = 0.5
    lr_matrices: float = 0.02
    lr_embedding: float = 0.01
    lr_rest: float = 0.003
    constant: float = 0.3


def make_demo_config(d_vocab: int) -> dict[str, object]:
    """Return the config.json of a small GLM-4: grouped queries, QKV biases, half of each head's channels rotated."""
    return {
        "architectures": ["GlmForCausalLM"], "model_type": "glm", "vocab_size": d_vocab, "hidden_size": 192,
        "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 32, "attention_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 1.5625e-07,
        "max_position_embeddings": 8192, "hidden_act": "silu", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "dtype": "bfloat16",
    }  # fmt: skip


def initialise_weights(model: GLM, recipe: TrainingConfig) -> None:
    """Initialise with wide embeddings, logits of scale 1, and sublayers that write zeros to the residual stream."""
    torch.manual_seed(recipe.seed)
    for name, p in model.named_parameters():
        if name == "embed.weight":
            torch.nn.init.normal_(p, std=recipe.embedding_std)
        elif name == "ln_final.weight":
            torch.nn.init.constant_(p, 1 / (recipe.embedding_std * model.cfg.d_model**0.5))
        elif name.endswith(("attn.out.weight", "mlp.down.weight", ".bias")):
            torch.nn.init.zeros_(p)
        elif p.ndim == 2:
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)


def draw_batch(engine: Tokenizer, recipe: TrainingConfig, step: int) -> Int[Tensor, "batch pos"]:
    """Return the token ids of one step: rows of the prefix and as many sentences as fit, the last one cut off."""
    texts = generate_documents(f"{recipe.seed}/{step}")
    prefix = engine.encode("").ids
    newline = engine.encode("\n", add_special_tokens=False).ids
    rows = []
    for _ in range(recipe.batch):
        row = list(prefix)
        while len(row) < recipe.pos:
            row += engine.encode(next(texts), add_special_tokens=False).ids + newline
        rows.append(row[: recipe.pos])
    return torch.tensor(rows)


class Muon(torch.optim.Optimizer):
    """The Muon optimizer: momentum that is orthogonalised before each update (Jordan et al. 2024).

    It runs in float32: torch's own Muon uses bfloat16, which is 30 times slower on a CPU.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update all matrices that have a gradient."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(momentum, group["momentum"]))  # Nesterov momentum
                # Tall matrices get a larger step: the update of every output channel has the same size.
                p.sub_(update, alpha=group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Return approximately the nearest matrix whose singular values are all 1, by Newton-Schulz iteration."""
    x = g if g.shape[0] <= g.shape[1] else g.T  # the smaller side first: x @ x.T is cheaper
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        a = x @ x.T
        # A quintic polynomial of the singular values that moves all of them towards 1.
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x if g.shape[0] <= g.shape[1] else x.T


def make_optimizers(model: GLM, recipe: TrainingConfig) -> list[torch.optim.Optimizer]:
    """Return Muon for the weight matrices, and AdamW for embeddings, biases and norms."""
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.ndim == 2 and name != "embed.weight"]
    rest = [{"params": [p], "lr": recipe.lr_rest} for p in named.values() if p.ndim < 2]
    rest.append({"params": [named["embed.weight"]], "lr": recipe.lr_embedding})
    return [
        Muon(matrices, lr=recipe.lr_matrices),
        torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=0.0),
    ]


def schedule_learning_rate(step: int, recipe: TrainingConfig) -> float:
    """Return the factor on the learning rate: 1 at first, then a cosine decay to 0.05."""
    done = max(0.0, (step / recipe.steps - recipe.constant) / (1 - recipe.constant))
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(min(1.0, done) * math.pi))


def train(out: Path, recipe: TrainingConfig) -> GLM:
    """Train a model, write its checkpoint to `out` and return it.

    Resumes from the state that an earlier run saved in `out`, if there is one.
    """
    out.mkdir(parents=True, exist_ok=True)
    engine = vocabulary.make_tokenizer()
    model = GLM(GLMConfig.from_dict(make_demo_config(engine.get_vocab_size())), "sdpa")
    initialise_weights(model, recipe)
    optimizers = make_optimizers(model, recipe)
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule_learning_rate(step, recipe))
        for optimizer in optimizers
    ]
    first = resume_training(out, model, [*optimizers, *schedulers])
    with tqdm(range(first, recipe.steps), initial=first, total=recipe.steps, desc="training") as bar:
        for step in bar:
            tokens = draw_batch(engine, recipe, step)
            loss = next_token_loss(model(tokens), tokens)
            loss.backward()
            for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
            if (step + 1) % SAVE_EVERY == 0:
                save_state(out, step=step + 1, model=model, others=[*optimizers, *schedulers])
                save_demo_checkpoint(out / f"step-{step + 1:04}", model, engine)
    save_demo_checkpoint(out, model, engine)
    return model


def save_state(out: Path, step: int, model: GLM, others: list) -> None:
    """Write everything that a resumed training needs, atomically."""
    state = {"step": step, "model": model.state_dict(), "others": [o.state_dict() for o in others]}
    with write_whole(out / "state.pt") as new:
        torch.save(state, new)


def resume_training(out: Path, model: GLM, others: list) -> int:
    """Load the state of an earlier run from `out`; return the next step, 0 without a state.

    Raises FileError if the file is not a complete state.
    """
    path = out / "state.pt"
    refuse_strange(path)
    if not path.exists():
        return 0
    try:
        state = torch.load(path, weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError) as e:
        raise FileError(f"{path}: not a complete training state: remove it to start again") from e
    model.load_state_dict(state["model"])
    for other, saved in zip(others, state["others"], strict=True):
        other.load_state_dict(saved)
    return state["step"]


def save_demo_checkpoint(out: Path, model: GLM, engine: Tokenizer) -> None:
    """Write a checkpoint folder in the format of transformers, in bfloat16."""
    out.mkdir(parents=True, exist_ok=True)
    # Tensors under the names that transformers gives them.
    parameters = {name: model.get_parameter(part.name) for name, [part] in map_checkpoint_tensors(model).items()}
    tensors = {name: p.detach().bfloat16().contiguous() for name, p in parameters.items()}
    with write_whole(out / "model.safetensors") as new:
        save_file(tensors, new, {"format": "pt"})
    with write_whole(out / "tokenizer.json") as new:
        engine.save(str(new))
    end, user, observation = (engine.token_to_id(t) for t in ("<|endoftext|>", "<|user|>", "<|observation|>"))
    stops = {"eos_token_id": [end, user, observation], "pad_token_id": end}
    write_demo_json(out / "config.json", make_demo_config(engine.get_vocab_size()) | stops)
    write_demo_json(out / "generation_config.json", stops)
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "padding_side": "left"}
    write_demo_json(
        out / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": vocabulary.DEMO_CHAT_TEMPLATE, **special},
    )


def write_demo_json(path: Path, content: dict[str, object]) -> None:
    """Write a JSON file with a line break at its end."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder for the checkpoint and saved states")
    parser.add_argument("--steps", type=int, default=TrainingConfig.steps)
    parser.add_argument("--seed", type=int, default=TrainingConfig.seed)
    args = parser.parse_args()
    train(expand_path(args.out), TrainingConfig(steps=args.steps, seed=args.seed))


if __name__ == "__main__":
    main()
