"""llama.cpp for `peers.py`: its file from a Llama checkpoint, and batches of sequences through its C interface."""

from __future__ import annotations

import ctypes
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

FILE_TYPES = {"q8_0": 7, "q4_0": 2}  # llama.h, enum llama_ftype
UBATCH_TOKENS = 512  # computed at once; llama.cpp's default
CONTEXT_STEP = 256  # a sequence's context is a multiple of this many tokens
UNKNOWN, CONTROL, NORMAL = 2, 3, 1  # gguf.TokenType

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def convert(model: Path, target: Path, *, precision: str) -> None:
    """A GGUF file: float16, or that quantized by llama.cpp itself."""
    half = target.with_name("llamacpp_f16")
    if not half.exists():
        partial = half.with_suffix(".partial")
        write_float16(model, partial)
        os.replace(partial, half)
    if precision == "f16":
        return
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = FILE_TYPES[precision], len(os.sched_getaffinity(0))
    status = llama_cpp.llama_model_quantize(os.fsencode(half), os.fsencode(target), ctypes.byref(params))
    if status:
        raise RuntimeError(f"llama_model_quantize to {precision} returned {status}")


def write_float16(model: Path, target: Path) -> None:
    import gguf
    from safetensors import safe_open

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    weight_map = json.loads((model / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_tokenizer(writer, config["vocab_size"])
    for name in sorted(weight_map):
        with safe_open(model / weight_map[name], framework="pt") as file:  # numpy has no bfloat16
            weight = file.get_tensor(name).float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = interleaved(weight, heads if "q_proj" in name else kv_heads)
        writer.add_tensor(gguf_name(name), weight.astype(np.float32 if weight.ndim == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: Any, vocab: int) -> None:
    """One that nobody asks: prompts are token ids."""
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", "<0x0A>", *(f"t{token_id}" for token_id in range(4, vocab))])
    writer.add_token_scores([0.0] * vocab)
    writer.add_token_types([UNKNOWN, CONTROL, CONTROL, *[NORMAL] * (vocab - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def interleaved(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows in the order that llama.cpp's rotary embedding expects: a head's two halves in turn."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in OUTER_NAMES:
        return f"{OUTER_NAMES[stem]}.weight"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{NAMES[part]}.weight"


@contextmanager
def open_model(path: Path, *, threads: int) -> Iterator[Decoder]:
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # which its log callback asks; each message costs time
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {path.name}; its log says why")
    try:
        yield Decoder(model, threads=threads)
    finally:
        llama_cpp.llama_model_free(model)


class Decoder:
    def __init__(self, model: Any, *, threads: int) -> None:
        import llama_cpp

        self._model, self._threads = model, threads
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    @contextmanager
    def session(self, prompts: list[list[int]], *, new_tokens: int) -> Iterator[Session]:
        """A context with a fresh cache, each sequence having a part of its own, and a batch that holds all prompts."""
        import llama_cpp

        length, num_tokens = max(map(len, prompts)) + new_tokens, sum(map(len, prompts))
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = len(prompts) * (-(-length // CONTEXT_STEP) * CONTEXT_STEP)
        params.n_batch, params.n_ubatch, params.n_seq_max = num_tokens, min(num_tokens, UBATCH_TOKENS), len(prompts)
        params.n_threads = params.n_threads_batch = self._threads
        params.kv_unified = False
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError(f"llama.cpp cannot make a context of {params.n_ctx} tokens; its log says why")
        batch = llama_cpp.llama_batch_init(num_tokens, 0, 1)
        try:
            yield Session(context, batch, prompts, vocab=self._vocab)
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)


class Session:
    """Greedy decoding of several sequences at once."""

    def __init__(self, context: Any, batch: Any, prompts: list[list[int]], *, vocab: int) -> None:
        self._context, self._batch, self._vocab = context, batch, vocab
        self._lengths = [0] * len(prompts)
        self._put(prompts)

    def step(self) -> list[int]:
        """The next token of every sequence; the first step computes the prompts."""
        import llama_cpp

        status = llama_cpp.llama_decode(self._context, self._batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        tokens = []
        for row in self._rows:
            logits = llama_cpp.llama_get_logits_ith(self._context, row)
            tokens.append(int(np.ctypeslib.as_array(logits, (self._vocab,)).argmax()))
        self._put([[token] for token in tokens])
        return tokens

    def _put(self, news: list[list[int]]) -> None:
        """Into the batch: each sequence's new tokens, the last of which is asked for logits."""
        batch, row = self._batch, 0
        self._rows = []
        for sequence, tokens in enumerate(news):
            for token in tokens:
                batch.token[row] = token
                batch.pos[row] = self._lengths[sequence]
                batch.n_seq_id[row] = 1
                batch.seq_id[row][0] = sequence
                batch.logits[row] = 0
                self._lengths[sequence] += 1
                row += 1
            batch.logits[row - 1] = 1
            self._rows.append(row - 1)
        batch.n_tokens = row
