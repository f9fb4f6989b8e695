"""What a forward pass keeps for the backward pass, in bytes, counted from the code of `llm/model`.

Stages: sizes and number formats -> terms of one block and of what is around the blocks -> the work space of a backward
pass through a block. `step_memory.py` puts them on the time line of a step.

The counting is that of Korthikanti et al. 2022 (Section 4), tensor by tensor: a tensor counts once, however many
operations keep it. Blocks that torch.compile has fused keep less: these are upper bounds for them.

Dimension letters: B rows, T time, n = B T tokens, D width, F width inside the FFN, H query heads, G key-value heads,
K width of a head, V vocabulary, L layers; w bytes of a number that enters a matrix product, h of one in the residual
stream.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..model import DecoderConfig
from ..model.activations import IN_FLOAT32
from ..model.fast_attention import KEPT, block_rows
from ..model.fast_linear import PART
from ..model.fast_loss import WIDE_ELEMENTS, chunk_rows
from ..model.residual import CONNECTIONS, copies
from ..model.streams import lacks_projections, receives
from .parameters import block_matrices, connection_matrices, head_matrix, stream_widths, table

Terms = dict[str, int]  # name of a term -> bytes

KEEPS_ITS_OUTPUT = ("relu", "sigmoid", "tanh", "identity")  # backward needs the result, which the next product keeps


@dataclass(frozen=True)
class Formats:
    """Bytes of a number: `weights` as held, `h` in the residual stream, `w` in matrix products.

    `autocast`: weights stay fp32 and every matrix product makes bf16 copies of what enters it.
    """

    weights: int
    h: int
    w: int
    autocast: bool = False


@dataclass(frozen=True)
class Work:
    """One micro-batch of one device: `rows` x `context` tokens through the model of `config`.

    Args:
        formats: of the numbers.
        kernels: "cuda" or "cpu": which tensors the kernels keep. On a CPU dropout's masks are numbers, and a compiled
            RMSNorm is not fused.
        masked: rows hold several documents that do not see each other.
        compiled: blocks through torch.compile.
    """

    config: DecoderConfig
    rows: int
    context: int
    formats: Formats
    kernels: str = "cuda"
    masked: bool = False
    compiled: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.context

    @property
    def hidden(self) -> int:
        """h n D: one tensor of the residual stream."""
        return self.formats.h * self.tokens * self.config.hidden_size

    @property
    def entering(self) -> int:
        """w n D: one tensor of the residual stream's width that enters matrix products."""
        return self.formats.w * self.tokens * self.config.hidden_size

    @property
    def inside(self) -> int:
        """w n F: one tensor inside the FFN."""
        return self.formats.w * self.tokens * self.config.intermediate_size

    @property
    def whole_attention(self) -> bool:
        """Whether the weights of all (query, key) are kept: there is no flash attention with dropout on CPUs, nor in
        fp32 on GPUs, whose other kernel knows no grouped heads (torch 2.13, `sdp_utils.cpp`)."""
        c = self.config
        if self.kernels == "cpu":
            return c.attention_dropout > 0 and not self.blocks_of_queries
        return self.formats.w == 4 and c.num_attention_heads != c.num_key_value_heads and not self.masked

    @property
    def blocks_of_queries(self) -> list[tuple[int, int]]:
        """Queries of each block and its keys, where attention goes by blocks (`model/fast_attention.py`): on a CPU,
        with dropout unless compiled or in bfloat16, not masked; else none."""
        if self.kernels != "cpu" or self.masked:
            return []
        if self.compiled if self.config.attention_dropout else self.formats.w != 2:
            return []
        rows = block_rows(self.context)
        starts = range(0, self.context, rows)
        return [(min(rows, self.context - start), min(start + rows, self.context)) for start in starts]

    @property
    def kept_of_blocks(self) -> int:
        """How many matrices each block keeps: softmax and dropout's factors, the softmax alone, or none."""
        return 2 if self.config.attention_dropout else 1 if self.context <= KEPT else 0


def block_terms(work: Work, index: int) -> Terms:
    """Bytes that block `index` keeps for the backward pass."""
    c, f, n = work.config, work.formats, work.tokens
    by_token = len(c.stream) if c.stream_source == "dense_by_token" and receives(c, index) else 0
    products = 3 - len(lacks_projections(c, index)) + by_token
    readers = products if f.autocast else 1  # autocast makes a copy of the input for each of them
    into_ffn = (2 if c.feedforward == "gated" else 1) if f.autocast else 1
    return {
        "norms": 2 * _norm(work) + _qk_norms(work),
        "inputs of q, k, v": readers * work.entering,
        "attention": _attention(work) - _kept_by_first_block(work, index),
        "stream": _stream(work, index),
        "residual form": _residual(work, index),
        "inputs of the FFN": into_ffn * work.entering,
        "inside the FFN": _inside(c) * work.inside,
        "dropout masks": 2 * _mask(c.residual_dropout, f.w, n * c.hidden_size, work.kernels),
    }


def _norm(work: Work) -> int:
    """Input and, for each token, one or two fp32 statistics."""
    c, n = work.config, work.tokens
    if c.norm == "layernorm":
        return work.hidden + 8 * n
    if work.kernels == "cuda" or not work.compiled:  # one kernel, or `model/norms.py`
        return work.hidden + 4 * n
    return 2 * 4 * n * c.hidden_size + 4 * n  # the input in fp32 and the normalised input


def _residual(work: Work, index: int) -> int:
    """The output that depth averages read again; or of each hyper-connection the copies that it is given, what its
    layer gives, and its coefficients, of which some are kept in fp32 on the way. The first copies are views of one
    tensor, which is kept too."""
    c, f, n = work.config, work.formats, work.tokens
    if c.residual == "dense":
        return work.hidden
    if c.residual not in CONNECTIONS:
        return 0
    several = copies(c)
    count = several * (several + 2)
    if c.residual == "hyper":
        coefficients = 4 * several + 4 * 2 * count + f.h * count
    else:
        coefficients = 4 + 4 * 3 * count + 4 * 2 * several + f.h * (several * (1 if f.h == 4 else 2) + several**2)
    return 2 * (several * work.hidden + work.entering + n * coefficients) + (work.hidden if index == 0 else 0)


def _qk_norms(work: Work) -> int:
    """The same of each head's queries and keys."""
    c, n, heads = work.config, work.tokens, work.config.num_attention_heads + work.config.num_key_value_heads
    if not c.qk_norm:
        return 0
    if work.kernels == "cuda" or not work.compiled:
        return work.formats.w * n * heads * c.head_dim + 4 * n * heads
    return 2 * 4 * n * heads * c.head_dim + 4 * n * heads


def _attention(work: Work) -> int:
    """q, k, v, what attention gives, and the logarithm of each softmax's sum (flash attention, Dao et al. 2022)."""
    c, f, n = work.config, work.formats, work.tokens
    queries, keys = n * c.num_attention_heads * c.head_dim, n * c.num_key_value_heads * c.head_dim
    every_pair = n * work.context * c.num_attention_heads  # B H T T
    if blocks := work.blocks_of_queries:  # q, k, v; what blocks keep; what enters o_proj
        pairs = work.rows * c.num_attention_heads * sum(queries_of * keys_of for queries_of, keys_of in blocks)
        return f.w * (2 * queries + 2 * keys + work.kept_of_blocks * pairs)
    if work.whole_attention:  # in fp32 q, k, v, softmax, dropout's factors and their product; what enters o_proj
        return 4 * (3 * queries + (3 if c.attention_dropout else 1) * every_pair) + f.w * queries
    if work.masked:  # no grouped heads with a mask, and the mask once more as numbers
        return f.w * (4 * queries + n * work.context) + 4 * n * c.num_attention_heads
    return f.w * (2 * queries + 2 * keys) + 4 * n * c.num_attention_heads


def _stream(work: Work, index: int) -> int:
    """A learned weight needs what arrives, and one of the layer's own projection needs that; sums with constant weights
    need nothing. Of a dense source only the projection of the block before is new.

    The first block's own projection, which arrives at the second and with source "first" everywhere, is kept by its
    attention already unless that has changed it."""
    c, n, numbers = work.config, work.tokens, 0
    if c.stream_weight == "fixed" or not receives(c, index):
        return 0
    for name, width in zip(c.stream, stream_widths(c), strict=True):
        if not (c.stream_source == "first" and index > 1) and (index > 1 or not _is_kept(work, name)):
            numbers += n * width
        numbers += n * width if c.stream_weight == "mix" else 0
        if c.stream_source == "dense_by_token":  # a weight for each earlier block, token and head
            numbers += n * index * (width // c.head_dim if c.stream_weight == "head" else 1)
    return work.formats.w * numbers


def _is_kept(work: Work, name: str) -> bool:
    """Whether the tensor of queries, keys or values that attention is given is kept: by a norm, or by attention itself
    unless RoPE turns it, a mask has grouped heads repeated, or blocks copy it."""
    c = work.config
    if c.qk_norm and name != "values":
        return True
    repeated = work.masked and c.num_key_value_heads != c.num_attention_heads and name != "queries"
    turned = c.position == "rope" and name != "values"
    return not (turned or repeated or work.blocks_of_queries)


def _kept_by_first_block(work: Work, index: int) -> int:
    """Bytes of queries, keys and values of a block without these projections, which are the first block's."""
    c, lacking = work.config, lacks_projections(work.config, index)
    if c.stream_arriving != 1 or work.whole_attention:
        return 0
    widths = zip(c.stream, stream_widths(c), strict=True)
    return work.formats.w * work.tokens * sum(w for name, w in widths if name in lacking and _is_kept(work, name))


def _inside(config: DecoderConfig) -> int:
    """Tensors of width F: gate, its activation, up and their product; or up and its activation."""
    tensors = 4 if config.feedforward == "gated" else 2
    return tensors - (config.hidden_act in KEEPS_ITS_OUTPUT)


def _mask(probability: float, width: int, numbers: int, kernels: str) -> int:
    if probability == 0:
        return 0
    return numbers * (1 if kernels == "cuda" else width)


def outer_terms(work: Work) -> Terms:
    """Bytes kept outside the blocks, the loss apart: ids and labels, embedding, angles, the last norm."""
    c, f, n = work.config, work.formats, work.tokens
    angles = 2 * f.h * (n if work.masked else work.context) * c.head_dim if c.position == "rope" else 0
    return {
        "ids and labels": 2 * 8 * n,
        "token values": _token_values(work),
        "embedding dropout": _mask(c.embedding_dropout, f.h, n * c.hidden_size, work.kernels),
        "angles": angles,
        "document mask": n * work.context if work.masked else 0,
        "last norm": _norm(work),
    }


def _token_values(work: Work) -> int:
    """What the gates multiply: a look-up of width G K, once for all layers."""
    c, f = work.config, work.formats
    number = {"none": 0, "values": f.w, "input": f.h}[c.value_embedding]
    return number * work.tokens * c.num_key_value_heads * c.head_dim


def checkpoint_terms(work: Work, index: int) -> Terms:
    """Bytes that a block keeps which is recomputed: its inputs, the hidden states and the stream's carry."""
    carried = sum(work.formats.w * work.tokens * width for width in stream_widths(work.config))
    given = work.hidden * (copies(work.config) if index > 0 else 1)
    given += work.hidden if work.config.residual == "dense" else 0  # the output, which averages read
    return {"block input": given, "carry": carried if index > 0 else 0}


def weight_copies(work: Work, index: int) -> int:
    """Bytes of a block's matrices in bf16: autocast copies them, and the backward pass needs the copies."""
    multiplied = sum(block_matrices(work.config, index)) - sum(connection_matrices(work.config))  # those are in fp32
    return 2 * multiplied if work.formats.autocast else 0


def backward_work(work: Work) -> int:
    """Bytes at work in the FFN's backward pass beyond what its block keeps: gradients of the hidden states and of inner
    tensors, at the highest of three operations. The attention's is smaller: by then the FFN's tensors are gone."""
    c, f, n = work.config, work.formats, work.tokens
    gated = c.feedforward == "gated"
    at_work = [
        work.inside + (work.entering + f.w * c.hidden_size * c.intermediate_size if f.autocast else 0),  # down_proj's
        (2 if gated else 1) * work.inside,  # of two factors, or of the activation; the product itself is gone
    ]
    if c.hidden_act in IN_FLOAT32:  # 5 fp32 tensors, and in half precision x and its gradient widened
        at_work.append(4 * (5 if f.w == 4 else 7) * n * c.intermediate_size - (work.inside if gated else 0))
    return work.hidden * copies(c) + max(at_work)


def attention_work(work: Work) -> int:
    """The same for attention whose whole matrix is kept: two more matrices, while the FFN's tensors are gone; of blocks
    three of the largest, and the gradients of q, k and v."""
    c = work.config
    if blocks := work.blocks_of_queries:
        largest = max(queries_of * keys_of for queries_of, keys_of in blocks)
        return work.formats.w * 3 * work.rows * c.num_attention_heads * largest + 4 * work.entering
    if not work.whole_attention:
        return 0
    return 2 * 4 * work.tokens * work.context * c.num_attention_heads + 4 * work.entering


def loss_forward(work: Work) -> Terms:
    """Bytes of the loss in its forward pass (`model/loss.py`), which also makes the gradient."""
    c, f, n = work.config, work.formats, work.tokens
    head, vocabulary = head_matrix(c), c.unpadded_vocab_size
    half, cpu = f.w == 2, work.kernels == "cpu"
    rows = min(n, chunk_rows(vocabulary, c.hidden_size, f.w))
    wide = min(rows, max(1, WIDE_ELEMENTS // vocabulary)) if half and cpu else 0
    # On a GPU one compiled kernel makes it along the way.
    capped = min(rows, max(1, WIDE_ELEMENTS // vocabulary)) if c.final_logit_softcapping and cpu else 0
    part = min(PART, vocabulary)
    if cpu:  # of one part of the vocabulary; in fp32 oneDNN is given a copy of its logits
        product = 6 * part * c.hidden_size if half else 4 * part * (rows + c.hidden_size)
    else:
        product = 2 * head if half else 0
    return {
        "gradient of the head, fp32": 4 * table(c),
        "gradient of the hidden states": work.entering,
        "hidden states": work.hidden + (work.entering if f.autocast else 0),
        "head in bf16": 2 * head if f.autocast else 0,
        "chunk of logits": f.w * rows * vocabulary + f.w * rows * c.hidden_size,
        "part of it in fp32": 4 * wide * vocabulary,
        "slope of the soft-cap": 4 * capped * vocabulary,
        "product of a chunk": product,
    }


def loss_backward(work: Work) -> Terms:
    """Bytes of the loss in its backward pass: the gradients times the incoming one, in the weights' format."""
    c, f = work.config, work.formats
    again = 4 * table(c) if f.w == 4 and work.kernels == "cpu" else 0  # elsewhere in place
    return {
        "gradient of the head, fp32": 4 * table(c),
        "its product": again + (2 * table(c) if f.weights == 2 else 0),
        "gradient of the hidden states": work.entering + (work.hidden if f.autocast else 0),
    }
