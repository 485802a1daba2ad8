"""The attention backend of vLLM: the only file that imports it.

One page per request and layer, of constant size, holds the slots and the open block of the layer's KV heads. vLLM's
``CircularBufferSpec`` means just that, one block per request for its whole life, so vLLM's own manager admits, frees
and preempts. How far a request was read follows from the number of its computed tokens: nothing but the page is kept.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import vllm
from packaging.version import Version
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import AttentionSpec, CircularBufferSpec, KVCacheLayout

from lococo.cache.buffers import LayerModules
from lococo.cache.plan import Plan
from lococo.config import LoCoCoConfig
from lococo.vllm.pages import PagedLayer, PageLayout, StepBatch
from lococo.vllm.settings import Settings

TESTED = (Version("0.29"), Version("0.33"))  # from the first on, before the second


def register() -> None:
    """Make vLLM find the backend where CUSTOM is asked for; nothing else changes."""
    register_backend(AttentionBackendEnum.CUSTOM, f"{__name__}.{LoCoCoBackend.__name__}")
    if current_platform.is_cpu():
        _let_cpu_choose()


def _let_cpu_choose() -> None:
    """CpuPlatform takes its own backend, whatever was asked for."""
    from vllm.platforms.cpu import CpuPlatform

    stock = CpuPlatform.get_attn_backend_cls
    if hasattr(stock, "lococo"):
        return

    @functools.wraps(stock)
    def get_attn_backend_cls(cls: Any, selected_backend: Any, *arguments: Any, **more: Any) -> str:
        if selected_backend == AttentionBackendEnum.CUSTOM:
            return AttentionBackendEnum.CUSTOM.get_path()
        return stock(selected_backend, *arguments, **more)

    get_attn_backend_cls.lococo = True  # type: ignore[attr-defined]
    CpuPlatform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


@dataclasses.dataclass(frozen=True, eq=False)
class Server:
    """What layers of this process share.

    Attributes
    ----------
    config : LoCoCoConfig
    modules : dict
        What every layer computes its memory with, for all KV heads.
    max_model_len : int
    total_kv_heads : int
        Of a layer, over all ranks.
    ranks : int
        Of tensor parallelism.
    """

    config: LoCoCoConfig
    modules: dict[int, LayerModules]
    max_model_len: int
    total_kv_heads: int
    ranks: int

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> Server:
        """Checked for what LoCoCo cannot do.

        Raises
        ------
        ValueError
            With what to do about it.
        """
        _check_version()
        options = vllm_config.additional_config
        settings = Settings.of(options.get("lococo") if isinstance(options, dict) else None)
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        if vllm_config.speculative_config is not None:
            raise ValueError("LoCoCo: no speculative decoding: tokens in slots cannot be taken back; leave it out")
        if parallel.decode_context_parallel_size > 1 or getattr(parallel, "prefill_context_parallel_size", 1) > 1:
            raise ValueError("LoCoCo: no context parallelism: a request has one page; use tensor parallelism")
        if vllm_config.kv_transfer_config is not None:
            raise ValueError("LoCoCo: no KV transfer or offloading: pages are no lists of tokens; leave it out")
        window = getattr(model.hf_text_config, "max_position_embeddings", None)
        if window is not None and model.max_model_len > window:
            raise ValueError(
                f"max_model_len={model.max_model_len} is more than the {window} positions that the model was made "
                "for: choose it smaller"
            )
        with torch.inference_mode(False):  # what is loaded is watched for changes
            modules = settings.modules(model.hf_text_config, model.dtype)
        total = model.get_total_num_kv_heads()
        return cls(settings.config, modules, model.max_model_len, total, parallel.tensor_parallel_size)

    @property
    def is_repeated(self) -> bool:
        """Whether several ranks have the same KV head, each with some of its queries."""
        return self.ranks > self.total_kv_heads

    def heads_of(self, rank: int) -> list[int]:
        """KV heads of a rank."""
        if self.is_repeated:
            return [rank * self.total_kv_heads // self.ranks]
        each = self.total_kv_heads // self.ranks
        return list(range(rank * each, (rank + 1) * each))

    def configs(self, layer_idx: int, rank: int) -> list[LoCoCoConfig]:
        """Of the KV heads of a rank."""
        configs = self.config.layer_configs(layer_idx)
        return [configs[head if len(configs) > 1 else 0] for head in self.heads_of(rank)]

    def layout(self, layer_idx: int, rank: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> PageLayout:
        """A layer's page on a rank."""
        network = self.modules[layer_idx].network
        return PageLayout.of(self.configs(layer_idx, rank), num_heads, head_dim, dtype, network)


def _check_version() -> None:
    version = Version(Version(vllm.__version__).base_version)
    if not TESTED[0] <= version < TESTED[1]:
        raise ValueError(
            f"LoCoCo works inside vLLM from {TESTED[0]} on and before {TESTED[1]}, this is {vllm.__version__}: "
            "install one of these, or leave --attention-backend CUSTOM out"
        )


_servers: dict[str, Server] = {}  # the last one, by the name of its config


def server(vllm_config: VllmConfig) -> Server:
    """That of this process, made with its first layer."""
    name = vllm_config.instance_id
    if name not in _servers:
        made = Server.of(vllm_config)
        _servers.clear()
        _servers[name] = made
    return _servers[name]


class LoCoCoBackend(AttentionBackend):
    """What vLLM asks of a backend."""

    supported_dtypes = [torch.float32, torch.float16, torch.bfloat16]

    @staticmethod
    def get_name() -> str:
        """A member of ``AttentionBackendEnum``."""
        return AttentionBackendEnum.CUSTOM.name

    @staticmethod
    def get_impl_cls() -> type[LoCoCoImpl]:
        """The attention of a layer."""
        _let_layers_choose()
        return LoCoCoImpl

    @staticmethod
    def get_builder_cls() -> type[LoCoCoMetadataBuilder]:
        """What makes the metadata of a step."""
        return LoCoCoMetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """One page behind the other."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Pages are no lists of tokens."""
        return False


def _let_layers_choose() -> None:
    """Give every layer the page that it needs: what a backend may say of them all does not tell which layer asks."""
    stock = Attention.get_kv_cache_spec
    if hasattr(stock, "lococo"):
        return

    @functools.wraps(stock)
    def get_kv_cache_spec(self: Attention, *arguments: Any, **more: Any) -> Any:
        spec = stock(self, *arguments, **more)
        return self.impl.page_spec(self.layer_name, spec) if isinstance(self.impl, LoCoCoImpl) else spec

    get_kv_cache_spec.lococo = True  # type: ignore[attr-defined]
    Attention.get_kv_cache_spec = get_kv_cache_spec


@dataclasses.dataclass
class Piece:
    """Several tokens of one request."""

    tokens: slice
    page: int
    seen: int
    plans: dict[int, Plan] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class LoCoCoMetadata:
    """A forward's requests: those that read several tokens, and all that read one.

    Attributes
    ----------
    pieces : list of Piece
    steps : StepBatch, optional
    stepping : torch.Tensor, optional
        (texts,), the token of each of these.
    """

    pieces: list[Piece]
    steps: StepBatch | None
    stepping: torch.Tensor | None


class LoCoCoMetadataBuilder(AttentionMetadataBuilder[LoCoCoMetadata]):
    """Makes it once for all layers, which vLLM asks for group by group."""

    # Blocks are compressed inside of the forward, which no graph may hold.
    _cudagraph_support = AttentionCGSupport.NEVER
    _last: tuple[Any, LoCoCoMetadata] | None = None

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._block_size = server(vllm_config).config.block_size

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> LoCoCoMetadata:
        """Metadata of a forward."""
        last = LoCoCoMetadataBuilder._last
        if last is None or last[0] is not common_attn_metadata:
            last = LoCoCoMetadataBuilder._last = common_attn_metadata, self._build(common_attn_metadata)
        return last[1]

    def _build(self, common: CommonAttentionMetadata) -> LoCoCoMetadata:
        starts = common.query_start_loc_cpu.tolist()
        lengths = common.seq_lens_cpu_upper_bound.tolist()
        pages = common.block_table_tensor[:, 0]
        counts = [starts[index + 1] - starts[index] for index in range(common.num_reqs)]
        seen = [length - count for length, count in zip(lengths, counts, strict=False)]
        one = [index for index, count in enumerate(counts) if count == 1]
        several = [index for index, count in enumerate(counts) if count > 1]
        pieces = []
        if several:
            known = pages.tolist()
            pieces = [Piece(slice(starts[i], starts[i + 1]), known[i], seen[i]) for i in several]
        if not one:
            return LoCoCoMetadata(pieces, None, None)
        index = torch.tensor([[i, starts[i]] for i in one]).T.to(pages.device)
        steps = StepBatch.of(pages[index[0]].long(), [seen[i] for i in one], self._block_size)
        return LoCoCoMetadata(pieces, steps, index[1])


class LoCoCoImpl(AttentionImpl):
    """The attention of a layer over its pages."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **more: Any,
    ) -> None:
        refused = {
            "ALiBi": alibi_slopes,
            "sliding windows": sliding_window,
            "layers that share their KV": kv_sharing_target_layer_name,
            "attention sinks": sinks,
            "attention that is not a decoder's": None if attn_type == "decoder" else attn_type,
            "what it does not know: " + ", ".join(more): next(
                (each for each in more.values() if each is not None), None
            ),
        }
        for name, value in refused.items():
            if value is not None:
                raise ValueError(
                    f"LoCoCo in vLLM does not support {name} ({value}): leave --attention-backend CUSTOM out for this "
                    "model, or give it to full attention alone: --attention-config.backend_per_kind"
                )
        vllm_config = get_current_vllm_config()
        model_type = str(vllm_config.model_config.dtype).removeprefix("torch.")
        if kv_cache_dtype not in ("auto", model_type):
            raise ValueError(
                f"LoCoCo keeps entries in the model's type ({model_type}) or codes them: leave --kv-cache-dtype "
                f'{kv_cache_dtype} out, or put "slot_bits": 8 into --additional-config\'s "lococo"'
            )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads or num_heads, kv_cache_dtype
        self.softcap = logits_soft_cap or None
        self._server = server(vllm_config)
        # Scores are of all queries of a KV head: each rank that has it attends with all of them.
        copies = self._server.ranks // self._server.total_kv_heads if self._server.is_repeated else 1
        self._num_heads = num_heads * copies
        self._paged: tuple[tuple[Any, ...], PagedLayer] | None = None

    def page_spec(self, layer_name: str, spec: AttentionSpec) -> AttentionSpec:
        """A page for a whole request in place of one for some tokens."""
        mine, layer_idx = self._server, extract_layer_index(layer_name)
        size = max(  # all ranks must say the same
            mine.layout(layer_idx, rank, self._num_heads, spec.head_size, spec.dtype).nbytes
            for rank in range(mine.ranks)
        )
        return CircularBufferSpec(
            block_size=mine.max_model_len,  # token t is looked for in block t // block_size, and there is one
            num_kv_heads=spec.num_kv_heads,
            head_size=spec.head_size,
            dtype=spec.dtype,
            num_head_slots=1,
            tokens_per_state=-1,  # one state per block
            state_content_bytes=size,
            **({"dcp_sharded": False} if hasattr(CircularBufferSpec, "dcp_sharded") else {}),  # not in 0.29
        )

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: LoCoCoMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of all requests' tokens.

        Parameters
        ----------
        query, output : torch.Tensor
            (tokens, heads, head_dim).
        key, value : torch.Tensor
            (tokens, kv_heads, head_dim).
        kv_cache : torch.Tensor
            (pages, 1, 1, numbers of a page).
        attn_metadata : LoCoCoMetadata, optional
            None while vLLM measures how much memory a forward takes.
        """
        if attn_metadata is None:
            return output.zero_()
        mine = self._layer(layer.layer_name, kv_cache, query)
        if self._num_heads > self.num_heads:
            first = get_tensor_model_parallel_rank() * self.num_heads
            query = tensor_model_parallel_all_gather(query.contiguous(), dim=1)
            group = first // self._num_heads * self._num_heads
            whole = query.new_empty(len(query), self._num_heads, self.head_size)
            self._attend(mine, query[:, group : group + self._num_heads], key, value, attn_metadata, whole)
            return output.copy_(whole[:, first - group : first - group + self.num_heads])
        self._attend(mine, query, key, value, attn_metadata, output)
        return output

    @staticmethod
    def _attend(
        mine: PagedLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_metadata: LoCoCoMetadata,
        output: torch.Tensor,
    ) -> None:
        for piece in attn_metadata.pieces:
            at = piece.tokens
            output[at] = mine.read(query[at], key[at], value[at], piece.page, piece.seen, piece.plans)
        if attn_metadata.steps is not None:
            now = attn_metadata.stepping
            output[now] = mine.step(query[now], key[now], value[now], attn_metadata.steps)

    def _layer(self, layer_name: str, kv_cache: torch.Tensor, like: torch.Tensor) -> PagedLayer:
        """Over the pages that vLLM has given it."""
        place = kv_cache.data_ptr(), kv_cache.shape, like.dtype
        if self._paged is None or self._paged[0] != place:
            layer_idx, rank = extract_layer_index(layer_name), get_tensor_model_parallel_rank()
            layout = self._server.layout(layer_idx, rank, self._num_heads, self.head_size, like.dtype)
            modules = self._server.modules[layer_idx]
            if modules.network is not None and get_tensor_model_parallel_world_size() > 1:
                modules = modules._replace(network=RankNetwork(modules.network, self._server, rank))
            pages = kv_cache.flatten(1).view(torch.uint8)
            how = (modules, self.scale, self.softcap)
            self._paged = place, PagedLayer(self._server.config, layer_idx, layout, self._num_heads, pages, *how)
        return self._paged[1]


class RankNetwork:
    """A score's network where every rank has some of the KV heads that it looks at."""

    def __init__(self, network: Any, shared: Server, rank: int) -> None:
        self.network, self.num_features = network, network.num_features
        self._server, self._own = shared, shared.heads_of(rank)

    def __call__(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """As of ``ScoreNetwork``, for the KV heads of this rank."""
        both = tensor_model_parallel_all_gather(torch.cat([keys, values], dim=-1).contiguous(), dim=1)
        copies = both.shape[1] // self._server.total_kv_heads
        keys, values = both[:, ::copies].split([keys.shape[-1], values.shape[-1]], dim=-1)
        return self.network(keys, values)[:, self._own]
