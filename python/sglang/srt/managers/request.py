"""One sequence as the scheduler sees it.

Created from a wire.SubmitRequest, owned by exactly one of: Admission (waiting), the planner's partial or running lists,
or nobody (finished, terminal row sent).

Token counts, which overlap makes different from one another:
    tokens known on the host     len(prompt) + len(output)
    tokens with KV (scheduled)   num_computed
    outputs scheduled            num_scheduled_outputs >= len(output): the rest are in flight on the device
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from sglang.srt.managers.io_struct import wire
from sglang.srt.managers.io_struct.wire import Finish, FinishInfo
from sglang.srt.mem_cache.kv_manager import SequenceKV
from sglang.srt.mem_cache.radix_cache import Namespace, Tokens
from sglang.srt.sampling.logprobs import HostScore
from sglang.srt.sampling.penalties import PenaltyState
from sglang.srt.sampling.sampler import SamplingRow


class Stage(enum.Enum):
    """Where a request is."""

    WAITING = "waiting"
    PREFILLING = "prefilling"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Request:
    """State of one sequence.

    Fields:
        prompt: int32 prompt tokens; output: generated ids known on the host.
        max_new_tokens: the spec's limit, lowered to what the KV pool can hold.
        input_scores: log-probabilities of the prompt, chunk by chunk, until they are sent.
        passed_over_at: when it was first refused an adapter slot since it was queued.
    """

    req_id: int
    prompt: Tokens
    sampling: SamplingRow
    namespace: Namespace
    priority: int
    arrival: int
    max_new_tokens: int
    logprob_start: int
    stage: Stage = Stage.WAITING
    output: list[int] = field(default_factory=list)
    kv: SequenceKV | None = None
    num_computed: int = 0
    num_scheduled_outputs: int = 0
    cached_tokens: int = 0
    cached_tokens_sent: bool = False
    input_scores: list[HostScore] = field(default_factory=list)
    input_scores_sent: bool = False
    num_retractions: int = 0
    passed_over_at: float | None = None

    @classmethod
    def from_wire(cls, message: wire.SubmitRequest, arrival: int, capacity: int) -> Request:
        """Build a request; `capacity` is the longest sequence the KV pool can hold."""
        prompt = np.frombuffer(message.input_ids, dtype="<i4")
        spec = message.sampling
        return cls(
            req_id=message.req_id,
            prompt=prompt,
            sampling=SamplingRow(
                spec=spec,
                position=0,
                penalties=None,
                return_logprob=message.return_logprob,
                top_logprobs_num=message.top_logprobs_num,
                token_ids_logprob=message.token_ids_logprob,
            ),
            namespace=Namespace(message.version_id, message.extra_key),
            priority=message.priority,
            arrival=arrival,
            max_new_tokens=min(spec.max_new_tokens, capacity - len(prompt)),
            logprob_start=message.logprob_start if message.return_logprob else len(prompt),
        )

    @property
    def version_id(self) -> int:
        """Weights that the next step runs it on."""
        return self.namespace.version_id

    @property
    def finished(self) -> bool:
        """Whether the terminal row has been written."""
        return self.stage is Stage.FINISHED

    @property
    def num_known(self) -> int:
        """Tokens known on the host."""
        return len(self.prompt) + len(self.output)

    @property
    def remaining_outputs(self) -> int:
        """Tokens that may still be scheduled."""
        return self.max_new_tokens - self.num_scheduled_outputs

    @property
    def known_tokens(self) -> NDArray[np.int32]:
        """int32 prompt and known output tokens."""
        if not self.output:
            return self.prompt
        return np.concatenate([self.prompt, np.asarray(self.output, dtype=np.int32)])

    @property
    def computed_tokens(self) -> NDArray[np.int32]:
        """Known tokens whose KV has been computed: what may be left in the prefix cache."""
        return self.known_tokens[: self.num_computed]

    @property
    def wants_input_scores(self) -> bool:
        """Whether prompt log-probabilities are still to be computed."""
        return self.logprob_start < len(self.prompt) and not self.input_scores_sent

    @property
    def match_limit(self) -> int:
        """Tokens a cached prefix may cover: one must be left to compute, and scored positions need their logits."""
        limit = self.num_known - 1
        if self.wants_input_scores:
            limit = min(limit, max(self.logprob_start - 1, 0))
        return limit

    def create_penalties(self, vocab_size: int, device: torch.device) -> None:
        """(Re)build the penalty counts from the tokens known on the host."""
        self.sampling.penalties = PenaltyState.create(self.sampling.spec, self.output, vocab_size, device)

    def retract(self) -> None:
        """Back to the queue: forget what was computed, keep what was generated."""
        self.stage = Stage.WAITING
        self.kv = None
        self.num_computed = 0
        self.num_scheduled_outputs = len(self.output)
        self.num_retractions += 1
        if not self.input_scores_sent:
            self.input_scores.clear()

    def switch(self, version_id: int) -> None:
        """Run on other weights from the next step on; KV that it has is of both then, and no longer shared."""
        self.namespace = Namespace(version_id, self.namespace.extra_key)
        if self.kv is not None:
            self.kv.private = True

    def abort_info(self, message: str, status_code: int = 0, err_type: str = "") -> FinishInfo:
        """Details for the terminal row of an abort."""
        return FinishInfo(
            message=message,
            status_code=status_code,
            err_type=err_type,
            num_retractions=self.num_retractions,
            was_running=self.stage is not Stage.WAITING or self.num_retractions > 0,
        )

    def check_stop(self, token: int) -> tuple[Finish, FinishInfo] | None:
        """Whether `token`, just appended to the output, ends the sequence."""
        spec = self.sampling.spec
        if token in spec.stop_token_ids and len(self.output) > spec.min_new_tokens:
            return Finish.STOP, FinishInfo(matched=token, num_retractions=self.num_retractions)
        if len(self.output) >= self.max_new_tokens:
            return Finish.LENGTH, FinishInfo(num_retractions=self.num_retractions)
        return None
