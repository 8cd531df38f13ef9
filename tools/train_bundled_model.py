"""Train the bundled model: a small OPT that writes Python, from the source text of the Python standard library.

    python tools/train_bundled_model.py --output asyncpipe/bundled_model --minutes 45

The output is a Hugging Face model directory: configuration, fp16 safetensors, a byte-level BPE tokenizer, a model card.
It is written anew every few minutes, so that a run cut short still leaves a model.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import sysconfig
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import GenerationConfig, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0..3, as in OPT
END = 2
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__", "turtledemo", "pydoc_data"}
MAX_FILE_BYTES = 200_000
MAX_MODEL_BYTES = 4_000_000
HELD_OUT_PERCENT = 5
SAVE_EVERY_S = 240.0
PROMPTS = ("def ", "import ", "class Stack:\n")


@dataclass(frozen=True)
class Shape:
    vocab_size: int = 2048
    hidden_size: int = 168
    ffn_dim: int = 672
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    max_position_embeddings: int = 512


@dataclass(frozen=True)
class Corpus:
    training: list[str]
    held_out: list[str]

    @property
    def num_bytes(self) -> int:
        return sum(len(text.encode()) for text in self.training)


def collect_corpus(library: Path) -> Corpus:
    """All library modules but tests and tables; a file is held out by a hash of its name, the same on every run."""
    training, held_out = [], []
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if SKIPPED_FOLDERS & set(relative.parts) or path.stat().st_size > MAX_FILE_BYTES:
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        is_held_out = zlib.crc32(str(relative).encode()) % 100 < HELD_OUT_PERCENT
        (held_out if is_held_out else training).append(text)
    return Corpus(training, held_out)


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", END)]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> torch.Tensor:
    """One stream of ids, (T,): each text preceded by the end token, which separates documents."""
    ids = [token for encoding in tokenizer.encode_batch(list(texts)) for token in encoding.ids]
    return torch.tensor(ids, dtype=torch.long)


def make_model(shape: Shape) -> OPTForCausalLM:
    config = OPTConfig(
        **asdict(shape),
        word_embed_proj_dim=shape.hidden_size,
        do_layer_norm_before=True,
        activation_function="relu",
        dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=1,
    )
    model = OPTForCausalLM(config)
    size = 2 * sum(parameter.numel() for parameter in model.parameters())
    if size > MAX_MODEL_BYTES - 50_000:
        raise SystemExit(f"the model would take {size} bytes; at most {MAX_MODEL_BYTES}")
    return model


def batches(stream: torch.Tensor, *, tokens: int, generator: random.Random, max_len: int) -> Iterator[torch.Tensor]:
    """Random windows, (B, T); one batch in four spans the whole context, so that every position is trained."""
    while True:
        length = max_len if generator.random() < 0.25 else max_len // 2
        starts = [generator.randrange(len(stream) - length - 1) for _ in range(tokens // length)]
        yield torch.stack([stream[start : start + length] for start in starts])


def learning_rate(progress: float, *, peak: float, warmup: float = 0.02) -> float:
    """Linear warm-up, then a cosine to a twentieth of the peak; `progress` is 0..1."""
    if progress < warmup:
        return peak * progress / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
    return peak * (0.05 + 0.95 * cosine)


@torch.inference_mode()
def held_out_loss(model: OPTForCausalLM, stream: torch.Tensor, *, length: int, limit: int = 160) -> float:
    """Mean loss in nats a token over consecutive windows."""
    model.eval()
    windows = stream[: len(stream) // length * length].view(-1, length)[:limit]
    losses = [model(input_ids=part, labels=part).loss.item() for part in windows.split(8)]
    model.train()
    return sum(losses) / len(losses)


@torch.inference_mode()
def sample(model: OPTForCausalLM, tokenizer: Tokenizer, prompt: str, *, temperature: float) -> str:
    model.eval()
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    choice = {"do_sample": True, "temperature": temperature, "top_p": 0.95} if temperature else {"do_sample": False}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=80, **choice)
    model.train()
    return str(tokenizer.decode(out[0].tolist()))


def train(model: OPTForCausalLM, stream: torch.Tensor, arguments: argparse.Namespace) -> Iterator[tuple[float, float]]:
    """Train for the given minutes; yields (progress, smoothed loss) after each step."""
    decayed = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=(0.9, 0.98))
    feed = batches(
        stream,
        tokens=arguments.batch_tokens,
        generator=random.Random(arguments.seed),
        max_len=model.config.max_position_embeddings,
    )
    started_s, smoothed = time.monotonic(), math.log(model.config.vocab_size)
    while (progress := (time.monotonic() - started_s) / (60 * arguments.minutes)) < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, peak=arguments.learning_rate)
        batch = next(feed)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        smoothed += 0.02 * (loss.item() - smoothed)
        yield progress, smoothed


CARD = """---
license: apache-2.0
language: [code]
pipeline_tag: text-generation
---
# A small OPT that writes Python

The model that asyncpipe runs when none is named. It is here so that a fresh checkout has something real to cut into
stages: it continues `def ` or `import ` with text that looks like Python. It is a demonstration and a test subject, not
an assistant, and what it writes rarely runs.

| | |
|---|---|
| architecture | OPT, pre-norm, tied head, learned positions |
| shape | {num_hidden_layers} layers, hidden {hidden_size}, {num_attention_heads} heads, feed-forward {ffn_dim}, context {max_position_embeddings}, vocabulary {vocab_size} |
| parameters | {num_params:,}, stored as float16 |
| tokenizer | byte-level BPE, trained on the same text; every text starts with `</s>` |
| data | the source text of the Python {python} standard library without its tests: {corpus_mb:.1f} MB, {held_out_percent} % of the files held out |
| data licence | Python Software Foundation License 2.0 |
| model licence | Apache-2.0 |
| training | {minutes:.0f} minutes on {threads} CPU threads, {steps:,} steps of {batch_tokens:,} tokens, AdamW, seed {seed} |
| held-out loss | {loss:.3f} nats a token = {bits_per_byte:.3f} bits a byte |

Reproduce: `python tools/train_bundled_model.py --output DIR --minutes {minutes:.0f}`.

## A sample

Prompt `def `, temperature 0.7, top-p 0.95:

```python
{sample}
```
"""


def save(directory: Path, model: OPTForCausalLM, tokenizer: Tokenizer, card: str) -> None:
    """Write the whole directory; the weights arrive under their name only when they are complete."""
    directory.mkdir(parents=True, exist_ok=True)
    half = OPTForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(directory)
    GenerationConfig(bos_token_id=END, eos_token_id=END, pad_token_id=1).save_pretrained(directory)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>",  # noqa: S106 - a text token
        eos_token="</s>",  # noqa: S106
        pad_token="<pad>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
        model_max_length=model.config.max_position_embeddings,
    ).save_pretrained(directory)
    (directory / "README.md").write_text(card, encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the model directory to write")
    parser.add_argument("--minutes", type=float, default=45.0, help="training time (default: 45)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens in one step (default: 2048)")
    parser.add_argument("--learning-rate", type=float, default=2.5e-3, help="its peak (default: 0.0025)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    shape = Shape()
    corpus = collect_corpus(Path(sysconfig.get_paths()["stdlib"]))
    tokenizer = train_tokenizer(corpus.training, shape.vocab_size)
    stream, held_out = encode(tokenizer, corpus.training), encode(tokenizer, corpus.held_out)
    bytes_per_token = sum(len(text.encode()) for text in corpus.held_out) / len(held_out)
    model = make_model(shape)
    num_params = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(stream):,} training tokens, {len(held_out):,} held out, {num_params:,} parameters", flush=True)

    def write(steps: int, minutes: float) -> None:
        loss = held_out_loss(model, held_out, length=shape.max_position_embeddings)
        card = CARD.format(
            **asdict(shape),
            num_params=num_params,
            python=f"{sys.version_info.major}.{sys.version_info.minor}",
            corpus_mb=corpus.num_bytes / 1e6,
            held_out_percent=HELD_OUT_PERCENT,
            minutes=minutes,
            threads=arguments.threads,
            steps=steps,
            batch_tokens=arguments.batch_tokens,
            seed=arguments.seed,
            loss=loss,
            bits_per_byte=loss / math.log(2) / bytes_per_token,
            sample=sample(model, tokenizer, PROMPTS[0], temperature=0.7).removeprefix("</s>"),
        )
        save(arguments.output, model, tokenizer, card)
        print(json.dumps({"step": steps, "minutes": round(minutes, 1), "held_out_loss": round(loss, 4)}), flush=True)

    started_s = saved_s = time.monotonic()
    step = 0
    with tqdm(total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining} {postfix}") as bar:
        for step, (progress, loss) in enumerate(train(model, stream, arguments), 1):
            bar.n = round(100 * progress, 1)
            bar.set_postfix_str(f"step {step}, loss {loss:.3f}", refresh=step % 20 == 0)
            if time.monotonic() - saved_s > SAVE_EVERY_S:
                write(step, (time.monotonic() - started_s) / 60)
                saved_s = time.monotonic()
    write(step, arguments.minutes)
    for prompt in PROMPTS:
        print(f"--- {prompt!r}\n{sample(model, tokenizer, prompt, temperature=0.0)}")


if __name__ == "__main__":
    main()
