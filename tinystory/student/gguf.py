"""Writes GGUF, the format of llama.cpp, Ollama and LM Studio: GPT-2's architecture in float32, with
the tokenizer.

llama.cpp begins a prompt with the file's `bos`. Here `bos` is the end token, which precedes every
document in training, so llama.cpp encodes a prompt as `encode_opening` does."""

import json
from pathlib import Path

from tinystory.data.tokenizer import Tokenizer
from tinystory.run.files import new_file, require_writable
from tinystory.student.hf import FIXED, renamed
from tinystory.student.model import Student

# Parts of our parameters' names -> llama.cpp's for its architecture "gpt2". Both store weights as
# (out, in).
NAMES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "blocks": "blk",
    "ln_1": "attn_norm",
    "qkv": "attn_qkv",
    "attn_proj": "attn_output",
    "ln_2": "ffn_norm",
    "fc": "ffn_up",
    "mlp_proj": "ffn_down",
    "ln_f": "output_norm",
    "lm_head": "output",
}
# Default sampling settings for llama.cpp (see its pull request 17120): the student's whole
# distribution. llama.cpp's own defaults truncate the distribution and penalise repeated names.
SAMPLING = {"temp": 1.0, "top_p": 1.0, "min_p": 0.0, "penalty_repeat": 1.0}
# A message is an opening. Without a template, llama.cpp's chat adds markup that was not in the
# student's training data.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def write(path: Path, student: Student, tokenizer: Tokenizer) -> None:
    """Write a GGUF file, atomically. Raises UserError if the file cannot be written."""
    from gguf import GGUFWriter, LlamaFileType, TokenType  # 0.2 s, which other exports do not need

    shape = student.config
    bpe = json.loads(tokenizer.json)["model"]
    vocab = bpe["vocab"] | tokenizer.specials
    token_types = [
        TokenType.NORMAL if text else TokenType.CONTROL for text in tokenizer.token_bytes
    ]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"]]
    require_writable(path)
    with new_file(path) as partial:
        writer = GGUFWriter(partial, "gpt2")
        fields = dict(
            name=path.stem,
            file_type=LlamaFileType.ALL_F32,
            block_count=shape.n_layer,
            head_count=shape.n_head,
            embedding_length=shape.n_embd,
            feed_forward_length=4 * shape.n_embd,
            context_length=shape.context,
            layer_norm_eps=FIXED["layer_norm_epsilon"][0],
            tokenizer_model="gpt2",
            tokenizer_pre="gpt-2",  # byte-level BPE, and GPT-2's split
            token_list=sorted(vocab, key=vocab.__getitem__),
            token_types=token_types,
            token_merges=merges,
            bos_token_id=tokenizer.eos,
            eos_token_id=tokenizer.eos,
            pad_token_id=tokenizer.pad,
            add_bos_token=True,
            chat_template=CHAT_TEMPLATE,
        )
        for name, value in fields.items():
            getattr(writer, f"add_{name}")(value)
        for name, number in SAMPLING.items():
            writer.add_float32(f"general.sampling.{name}", number)
        writer.add_int32("general.sampling.top_k", 0)
        for ours, weight in student.state_dict().items():
            writer.add_tensor(renamed(ours, NAMES), weight.cpu().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(path)
