"""A hook-free forward compiles to one graph. In its own process: shape checking and tracing do not mix."""

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
sys.path.insert(0, {tests!r})
import torch
from conftest import small_lens

graphs = []
def note(graph, inputs):
    graphs.append(graph)
    return graph.forward

lens = small_lens({model_type!r}, {attention!r}, num_hidden_layers=2)
tokens = torch.randint(2, 101, (2, 9))
compiled = torch.compile(lens.model, fullgraph=True, backend=note)
torch.testing.assert_close(compiled(tokens), lens(tokens), rtol=0, atol=1e-5)
print(len(graphs))
"""


@pytest.mark.parametrize(("model_type", "attention"), [("glm", "eager"), ("glm4", "sdpa")])
def test_a_hook_free_forward_is_one_graph(model_type, attention):
    code = CODE.format(tests=str(Path(__file__).parent), model_type=model_type, attention=attention)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "1"
