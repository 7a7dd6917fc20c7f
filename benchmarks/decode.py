"""Time whole forward steps in memory: mixtura by width, transformers and llama.cpp, beside the memory's rate.

Models of three well-known shapes, a few layers of each, with random weights: decode steps after a short
context, of one sequence or of several at once, a new token of each with all its logits. All contenders take
turns, round after round, and the rate at which this machine reads memory is measured in the same rounds.

    python benchmarks/decode.py --models OLMoE --llama path/to/llama.cpp/bin --work folder

Without ``--llama`` (a folder with ``llama-batched-bench`` and ``llama-quantize``) llama.cpp is left out. Each
call measures one or more models and joins its results to those kept.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from layer import machine, spread
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, PreTrainedConfig, Qwen3MoeConfig

import mixtura
from mixtura.kernels import ExpertMatrices, NativeLayer, PackedLinear, coded_matrix, quicken, using
from mixtura.kernels.compiled import num_threads
from mixtura.kernels.linears import FewRowsLinear
from mixtura.kernels.paths import paths_of
from mixtura.kernels.rates import MemoryReader
from mixtura.machine.releases import returned_cache, with_cache
from mixtura.methods import create

RESULTS = Path(__file__).parent / "results" / "decode.json"
NUM_TOKENS = (1, 4, 16, 64)
CONTEXT, STEPS, ATTEMPTS = 16, 12, 5
GROUP = 64
# Rates of memory are the same where they differ by at most this share; samples at the usual one at least.
STEADY, LEAST_USUAL = 0.1, 2
BITS_PER_WEIGHT = {
    "int8": 8, "int4": 4 + 16 / GROUP, "int2": 2 + 16 / GROUP, "Q8_0": 8.5, "Q4_0": 4.5, "Q2_K": 2.625,
}  # fmt: skip
THEIRS = ("eager", "batched_mm", "grouped_mm")
# Bits of ours -> llama.cpp's nearest format, as its tools name it.
FORMATS = {16: "BF16", 8: "Q8_0", 4: "Q4_0", 2: "Q2_K"}


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's shape: its config and its name in llama.cpp."""

    name: str
    arch: str
    config: PreTrainedConfig


SHAPES = (
    Shape(
        "OLMoE",
        "olmoe",
        OlmoeConfig(
            vocab_size=50304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=4,
            num_attention_heads=16, num_key_value_heads=16, num_experts=64, num_experts_per_tok=8,
        ),
    ),
    Shape(
        "Qwen3-30B-A3B",
        "qwen3moe",
        Qwen3MoeConfig(
            vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768,
            num_hidden_layers=2, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
            num_experts=128, num_experts_per_tok=8, norm_topk_prob=True,
        ),
    ),
    Shape(
        "Mixtral",
        "llama",
        MixtralConfig(
            vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=1,
            num_attention_heads=32, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
        ),
    ),
)  # fmt: skip


class Codes:
    """An experts store of random codes: what a packed checkpoint would hold, without encoding one."""

    def __init__(self, experts: nn.Module, bits: int, generator: torch.Generator) -> None:
        up, down = experts.gate_up_proj, experts.down_proj
        self.num_experts = up.shape[0]
        made = [
            ExpertMatrices(*(random_matrix(*w.shape[1:], bits, generator) for w in (up, down)))
            for _ in range(self.num_experts)
        ]
        layer = NativeLayer.of(made)
        assert layer is not None
        self._layer = layer
        self.expert_bytes = made[0].up.num_bytes + made[0].down.num_bytes

    def native_layer(self) -> NativeLayer:
        """The codes as the kernels read them."""
        return self._layer


def random_codes(rows: int, cols: int, bits: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Codes and scales of weights of about the usual size."""
    group = cols if bits == 8 else GROUP
    codes = torch.randint(0, 256, (rows, cols * bits // 8), generator=generator, dtype=torch.uint8)
    scales = torch.full((rows, cols // group), 3.5 * cols**-0.5 / 2**bits, dtype=torch.bfloat16)
    return codes, scales


def random_matrix(rows: int, cols: int, bits: int, generator: torch.Generator) -> Any:
    """A matrix of random codes for the kernels."""
    codes, scales = random_codes(rows, cols, bits, generator)
    return coded_matrix(codes, scales, cols=cols, bits=bits, group=cols if bits == 8 else GROUP)


@dataclass(slots=True)
class Contender:
    """One way to run a model, and the bytes of weights it reads for one token."""

    name: str
    run: Callable[[int], float]  # seconds of one forward of so many tokens
    bytes_per_token: int | None = None


def make_model(shape: Shape) -> nn.Module:
    """The model in bfloat16 with random weights."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(shape.config, dtype=torch.bfloat16).eval().requires_grad_(False)


def packed_copy(shape: Shape, model: nn.Module, bits: int) -> tuple[nn.Module, int]:
    """The model with experts and linear layers of random codes, and the bytes one token reads."""
    generator = torch.Generator().manual_seed(bits)
    with torch.device("meta"):
        copy = AutoModelForCausalLM.from_config(shape.config, dtype=torch.bfloat16).eval()
    total = 0
    for name, module in list(copy.named_modules()):
        parent = copy.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Linear):
            codes, scales = random_codes(module.out_features, module.in_features, bits, generator)
            group = GROUP if bits < 8 else module.in_features
            quantizer = create("quantizers", "round_to_nearest", bits=bits, group_size=group)
            packed = PackedLinear(
                codes, scales, quantizer=quantizer, in_features=module.in_features, bias=None
            )
            setattr(parent, name.rpartition(".")[2], packed)
            total += codes.nbytes + scales.nbytes
        elif name.endswith(".experts"):
            store = Codes(model.get_submodule(name), bits, generator)
            for parameter in list(module._parameters):
                delattr(module, parameter)
            module.mixtura_store = store
            total += store.expert_bytes * shape.config.num_experts_per_tok
    for name, parameter in model.named_parameters():
        holder, _, last = name.rpartition(".")
        owner = copy.get_submodule(holder)
        if last in owner._parameters:
            owner._parameters[last] = parameter
            total += parameter.nbytes if ".gate." in name else 0
    for name, buffer in model.named_buffers():
        holder, _, last = name.rpartition(".")
        copy.get_submodule(holder)._buffers[last] = buffer
    quicken(copy)
    return copy.requires_grad_(False), total


def dense_bytes(shape: Shape, model: nn.Module) -> int:
    """Bytes of weights that one token reads of the model in bfloat16."""
    total = 0
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            continue
        share = 1.0
        if ".experts." in name:
            share = shape.config.num_experts_per_tok / parameter.shape[0]
        total += int(parameter.nbytes * share)
    return total


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """The model with PyTorch's own linear layers, for the time of a measurement of theirs."""
    taken = [module for module in model.modules() if type(module) is FewRowsLinear]
    for module in taken:
        module.__class__ = nn.Linear
    try:
        yield
    finally:
        for module in taken:
            module.__class__ = FewRowsLinear


def seconds_of_step(model: nn.Module, num_sequences: int, vocab: int) -> float:
    """Mean over some steps: which experts are needed, and how many, differs from one to the next."""
    generator = torch.Generator().manual_seed(num_sequences)
    ids = torch.randint(0, vocab, (num_sequences, CONTEXT + STEPS), generator=generator)
    with torch.inference_mode():
        cache = None
        for place in range(CONTEXT):
            # Token by token: codes without a way to decode them serve few tokens at a time.
            made = model.model(ids[:, place : place + 1], **with_cache(cache), use_cache=True)
            cache = returned_cache(made)
        start = time.perf_counter()
        for step in range(CONTEXT, CONTEXT + STEPS):
            model(ids[:, step : step + 1], **with_cache(cache), use_cache=True)
        return (time.perf_counter() - start) / STEPS


def refuse_other_paths(model: nn.Module) -> None:
    """Stop where what was just timed is not the compiled whole step that this benchmark is about."""
    for path in paths_of(model, probe=False):
        if path.path != "whole step":
            raise SystemExit(
                f"{path.layer} ran by the path {path.path!r} instead of a whole step, so this is no time of "
                f"the compiled step: {path.reason}"
            )


def contenders(shape: Shape, model: nn.Module) -> list[Contender]:
    """Ours in every width and transformers' own."""
    vocab = shape.config.vocab_size
    found = []
    quicken(model)

    def ours(which: nn.Module) -> Callable[[int], float]:
        def run(num_tokens: int) -> float:
            which.config._experts_implementation = "mixtura"
            seconds = seconds_of_step(which, num_tokens, vocab)
            refuse_other_paths(which)
            return seconds

        return run

    def with_bytes(which: nn.Module) -> Callable[[int], float]:
        def run(num_tokens: int) -> float:
            with using(int8_inputs=True):
                return ours(which)(num_tokens)

        return run

    def theirs(name: str) -> Callable[[int], float]:
        def run(num_tokens: int) -> float:
            model.config._experts_implementation = name
            with as_it_was(model), using("torch"):
                return seconds_of_step(model, num_tokens, vocab)

        return run

    found.append(Contender("mixtura bfloat16", ours(model), dense_bytes(shape, model)))
    for bits in (8, 4, 2):
        copy, num_bytes = packed_copy(shape, model, bits)
        found.append(Contender(f"mixtura int{bits}", ours(copy), num_bytes))
        # As llama.cpp multiplies: inputs of eight bits beside codes.
        found.append(Contender(f"mixtura int{bits}, int8 inputs", with_bytes(copy), num_bytes))
    return found + [Contender(f"transformers {name}", theirs(name)) for name in THEIRS]


class Llama:
    """llama.cpp's own benchmark on the same shapes, each format in a file of its own."""

    def __init__(self, folder: Path, work: Path, shape: Shape) -> None:
        self._folder = folder
        self._files = {name: work / f"{shape.name}-{name}.gguf" for name in FORMATS.values()}

    def prepare(self, shape: Shape, model: nn.Module) -> None:
        """Write the files that are not there yet."""
        source = self._files["BF16"]
        if not source.exists():
            write_gguf(source, shape, model)
        for name, path in self._files.items():
            if not path.exists():
                command = [self._folder / "llama-quantize", "--pure", source, path, name, "2"]
                subprocess.run(command, check=True, capture_output=True)

    def contenders(self) -> list[Contender]:
        """One for each format."""
        return [Contender(f"llama.cpp {name}", self._runner(path)) for name, path in self._files.items()]

    def _runner(self, path: Path) -> Callable[[int], float]:
        def run(num_tokens: int) -> float:
            command = [self._folder / "llama-batched-bench", "-m", path, "--output-format", "jsonl"]
            command += ["-npp", str(CONTEXT), "-ntg", str(STEPS), "-npl", str(num_tokens)]
            command += ["-c", str(num_tokens * 2 * (CONTEXT + STEPS) + 512)]
            command += ["-t", str(num_threads()), "-tb", str(num_threads())]
            # Its log is written by a thread that it does not always wait for.
            for _ in range(ATTEMPTS):
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                told = [line for line in done.stdout.splitlines() if line.startswith("{")]
                if told:
                    return float(json.loads(told[0])["t_tg"]) / STEPS
            raise RuntimeError(f"llama-batched-bench says no times, only: {done.stderr[-400:]}")

        return run


def write_gguf(path: Path, shape: Shape, model: nn.Module) -> None:
    """The model as llama.cpp reads it, in bfloat16, without a vocabulary."""
    import gguf

    config = shape.config
    writer = gguf.GGUFWriter(path, shape.arch)
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(width)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    for name, tensor in gguf_tensors(model):
        if tensor.ndim == 1 or "gate_inp" in name:
            writer.add_tensor(name, tensor.float().numpy())
        else:
            data = tensor.contiguous().view(torch.uint16).numpy().view(np.uint8)
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under llama.cpp's name."""
    renamed = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "mlp.gate": "ffn_gate_inp",
        "block_sparse_moe.gate": "ffn_gate_inp",
    }
    yield "token_embd.weight", model.model.embed_tokens.weight
    yield "output_norm.weight", model.model.norm.weight
    yield "output.weight", model.lm_head.weight
    for number, layer in enumerate(model.model.layers):
        for name, parameter in layer.named_parameters():
            module, _, kind = name.rpartition(".")
            if kind == "gate_up_proj":
                gate, up = parameter.chunk(2, dim=1)
                yield f"blk.{number}.ffn_gate_exps.weight", gate
                yield f"blk.{number}.ffn_up_exps.weight", up
            elif kind == "down_proj":
                yield f"blk.{number}.ffn_down_exps.weight", parameter
            else:
                yield f"blk.{number}.{renamed[module]}.weight", parameter


def measure(shape: Shape, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one model: each contender at each number of tokens."""
    model = make_model(shape)
    rivals = contenders(shape, model)
    if args.llama is not None:
        llama = Llama(args.llama, args.work, shape)
        llama.prepare(shape, model)
        rivals += llama.contenders()
    if args.prepare:
        return []
    memory = MemoryReader()
    rows = []
    everybody = rivals
    for num_tokens in args.tokens:
        # It copies every chosen expert's weights for every token: gigabytes for several, and never the best.
        rivals = [one for one in everybody if num_tokens == 1 or "batched_mm" not in one.name]
        taken: dict[str, list[Sample]] = {one.name: [] for one in rivals}
        for one in rivals:
            if not one.name.startswith("llama"):
                one.run(num_tokens)
        for turn in range(args.rounds):
            for one in rivals[turn % len(rivals) :] + rivals[: turn % len(rivals)]:
                before = memory.bytes_per_second()
                seconds = one.run(num_tokens)
                taken[one.name].append(Sample(seconds, before, memory.bytes_per_second()))
        rows += [row(shape, num_tokens, one, taken) for one in rivals]
        print("\n".join(line(one) for one in rows[-len(rivals) :]), flush=True)
    return rows


@dataclass(frozen=True, slots=True)
class Sample:
    """Seconds that something took, and the rates at which memory was read just before and after it."""

    seconds: float
    before: float
    after: float

    @property
    def rate(self) -> float:
        """The rate meanwhile."""
        return (self.before + self.after) / 2

    @property
    def is_steady(self) -> bool:
        """Whether the rate stayed as it was."""
        return abs(self.after - self.before) <= STEADY * self.rate


def row(shape: Shape, num_tokens: int, one: Contender, taken: dict[str, list[Sample]]) -> dict[str, Any]:
    """One contender's numbers.

    What others do on the machine changes the rate of memory, from a third less to all of it, for seconds at
    a time. So each time is also given as it is at the usual rate, from the samples during which it was that.
    """
    everything = [sample for samples in taken.values() for sample in samples]
    rate = statistics.median(sample.rate for sample in everything if sample.is_steady)
    samples = taken[one.name]
    usual = [s for s in samples if s.is_steady and abs(s.rate - rate) <= STEADY * rate]
    if len(usual) < LEAST_USUAL:
        usual = samples
    seconds = [sample.seconds for sample in samples]
    scaled = [sample.seconds * sample.rate / rate for sample in usual]
    made: dict[str, Any] = {
        "model": shape.name,
        "num_layers": shape.config.num_hidden_layers,
        "num_tokens": num_tokens,
        "name": one.name,
        "rounds": len(seconds),
        "rounds_at_usual_rate": len(usual),
        "ms": spread([1e3 * s for s in seconds]),
        "ms_at_usual_rate": spread([1e3 * s for s in scaled]),
        "tokens_per_s": round(num_tokens / statistics.median(seconds), 2),
        "read_gb_per_s": spread([sample.rate / 1e9 for sample in everything]),
        "usual_read_gb_per_s": round(rate / 1e9, 2),
        "samples_ms_gb_per_s": [
            [round(v, 3) for v in (1e3 * s.seconds, s.before / 1e9, s.after / 1e9)] for s in samples
        ],
        "load_average": round(os.getloadavg()[0], 2),
    }
    if one.bytes_per_token is not None and num_tokens == 1:
        made["bytes_per_token"] = one.bytes_per_token
        made["gb_per_s"] = round(one.bytes_per_token / statistics.median(seconds) / 1e9, 2)
        made["share_of_read_rate"] = round(one.bytes_per_token / rate / statistics.median(scaled), 3)
    return made


def line(one: dict[str, Any]) -> str:
    """A row for people."""
    share = ""
    if "gb_per_s" in one:
        share = f"{one['share_of_read_rate']:.0%} of {one['usual_read_gb_per_s']:.1f} GB/s"
    return (
        f"{one['model']:14} T={one['num_tokens']:<3} {one['name']:26} {one['ms']['median']:9.2f} ms "
        f"{one['ms_at_usual_rate']['median']:9.2f} ms at the usual rate  {share}"
    )


def join(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Keep the rows beside those of other models and numbers of tokens that are there already."""
    known = json.loads(args.out.read_text())["results"] if args.out.exists() else []
    new = {(one["model"], one["num_tokens"]) for one in rows}
    kept = [one for one in known if (one["model"], one["num_tokens"]) not in new]
    record = {
        "benchmark": "decode",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": machine(),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "mixtura": mixtura.__version__,
        },
        "bits_per_weight": BITS_PER_WEIGHT,
        "results": kept + rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    """Measure the models asked for and keep the JSON."""
    names = [shape.name for shape in SHAPES]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--tokens", nargs="+", type=int, default=list(NUM_TOKENS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--llama", type=Path, default=None, help="folder with llama-bench and llama-quantize")
    parser.add_argument("--work", type=Path, default=Path("decode-files"), help="where llama.cpp's files lie")
    parser.add_argument("--prepare", action="store_true", help="only write llama.cpp's files")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    mixtura.register_backend()
    for shape in SHAPES:
        if shape.name in args.models:
            rows = measure(shape, args)
            if rows:
                join(args, rows)
            gc.collect()


if __name__ == "__main__":
    main()
