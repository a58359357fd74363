"""The page "Fine-tune": its commands take a folder that `transformers` wrote through a run and back, as they stand.

Needs the extra `parity`."""

import json
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest

from artifex import sample, train
from artifex.data.batches import validation_batches
from artifex.data.text import load_text
from artifex.data.tokenizers import load_tokenizer, save_tokenizer, train_bpe

torch = pytest.importorskip("torch", reason="parity with transformers needs: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="parity with transformers needs: pip install -e '.[parity]'")

PAGE = (Path(__file__).parents[1] / "docs/finetune.md").read_text(encoding="utf-8").partition("## A Llama")[2]
TEXT = "".join(f"one line of text, the {i} th of them\n" for i in range(600))


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """A folder in which the page's commands and its block ran, where `llama/` and `notes.txt` were."""
    folder = tmp_path_factory.mktemp("walk")
    (folder / "notes.txt").write_text(TEXT)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    more = {"max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "initializer_range": 0.2}
    config = transformers.LlamaConfig(vocab_size=300, **sizes, **more)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "llama")
    save_tokenizer(train_bpe([TEXT], 300), folder / "llama" / "tokenizer.json")
    commands = [shlex.split(line) for line in re.findall(r"^python -m (artifex\.\w+ .+)$", PAGE, re.MULTILINE)]
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for program, *words in commands:
            {"artifex.train": train, "artifex.sample": sample}[program].main(words)
        exec(compile(block, "finetune.md", "exec"), {"__name__": "__main__"})
    return folder


def records(folder):
    return [json.loads(line) for line in (folder / "runs/llama/metrics.jsonl").read_text().splitlines()]


def test_the_score_before_the_first_step_is_that_of_transformers(walked):
    corpus = load_text(walked / "notes.txt", tokenizer=str(walked / "llama/tokenizer.json"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(walked / "llama")
    nats, weight = 0.0, 0
    for batch in validation_batches(corpus.validation, batch_size=16, sequence_length=256, count=20):
        with torch.no_grad():
            logits = theirs(torch.tensor(np.asarray(batch["tokens"], np.int64))).logits
        targets = torch.tensor(np.asarray(batch["targets"], np.int64))
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        mask = torch.tensor(np.asarray(batch.get("mask", np.ones(targets.shape)))).flatten()
        nats, weight = nats + float((each * mask).sum()), weight + float(mask.sum())
    first, *_, last = [record for record in records(walked) if record["split"] == "validation"]
    assert first["step"] == 0
    np.testing.assert_allclose(first["loss"], nats / weight, rtol=1e-4)
    assert last["loss"] < first["loss"] - 0.5


def test_what_was_tuned_goes_back_with_its_tokenizer(walked):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(walked / "tuned")
    assert type(theirs).__name__ == "LlamaForCausalLM"
    prompt = "one line of text"
    ids = transformers.AutoTokenizer.from_pretrained(walked / "tuned")(prompt)["input_ids"]
    assert ids == load_tokenizer(walked / "llama" / "tokenizer.json").encode(prompt).tolist()
    ours = sample.load(walked / "runs/llama")
    with torch.no_grad():
        wanted = theirs(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(jax.device_get(ours(np.array([ids]))), wanted, rtol=1e-3, atol=1e-4)
    greedy = theirs.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=None)[0]
    (text,) = sample.sample(walked / "tuned", prompt, num_tokens=8, temperature=0)
    assert text == load_tokenizer(walked / "tuned/tokenizer.json").decode(greedy.tolist())
