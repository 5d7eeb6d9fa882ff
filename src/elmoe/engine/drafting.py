"""Drafting: resident MSB slices propose tokens. A chain is a tree without branches."""

from __future__ import annotations

from dataclasses import dataclass

from elmoe.engine.decoder import Draft
from elmoe.engine.passes import Passes, Row
from elmoe.engine.scheduler import Batch, Scheduler
from elmoe.engine.sequence import Proposal, Proposals, Sequence
from elmoe.engine.tier import ExpertTier
from elmoe.errors import NumericsError, RequestError
from elmoe.policy.planner import Plan, Planner


@dataclass(frozen=True)
class DraftRules:
    """How drafts compute: see ``EngineOptions`` and ``bitslice.Draft``."""

    top_k: int
    rescale: bool
    offset: float
    bits: int


class Drafter:
    """Drafts for the sequences of a batch, one token of each per pass, as long as the planner expects it to pay."""

    def __init__(self, passes: Passes, scheduler: Scheduler, tier: ExpertTier, planner: Planner, rules: DraftRules) -> None:
        self._passes, self._scheduler, self._tier, self._planner, self._rules = passes, scheduler, tier, planner, rules

    def draft(self, batch: Batch, plan: Plan) -> Proposals:
        """Tokens that verification will judge. None beside a chunk of a prompt: such a pass is long whatever it verifies."""
        limit = plan.draft_length
        if limit == 0 or batch.chunks or not self._tier.can_draft:
            return {}
        proposals = {sequence: Proposal() for sequence in batch.decoding}
        rules = self._rules
        means = Draft(self._tier.allowed, rules.top_k, rules.rescale, rules.offset, rules.bits)
        # The last committed token always comes from the target, so a draft of room - 1 tokens can fill the room.
        active = [sequence for sequence in batch.decoding if min(limit, sequence.room - 1) > 0]
        while active := [one for one in active if self._room_for(one, proposals)]:
            if not self._propose(active, proposals, means):
                return {}
            more = self._planner.proceed([proposals[one].confidences for one in active], plan)
            active = [
                one
                for one, proceed in zip(active, more, strict=True)
                if proceed and len(proposals[one].tokens) < min(limit, one.room - 1)
            ]
        return {sequence: proposal for sequence, proposal in proposals.items() if proposal.tokens}

    def _room_for(self, one: Sequence, proposals: Proposals) -> bool:
        """Whether there are pages to draft one more token and to verify it."""
        return self._scheduler.grow(one, len(one.tokens) + len(proposals[one].tokens) + 1)

    def _propose(self, active: list[Sequence], proposals: Proposals, means: Draft) -> bool:
        """One more token of each; False if the draft met a value that is not finite, which tells nothing of the target, or
        a grammar that cannot be followed, which verification will tell."""
        rows = []
        for one in active:
            drafted = proposals[one].tokens
            rows.append(Row(one, len(one.tokens) - 1 + len(drafted), drafted[-1] if drafted else one.tokens[-1]))
        try:
            done = self._passes.run("draft", rows, proposals, draft=means)
        except (NumericsError, RequestError):
            self._tier.abandon_pass()
            return False
        for one, sample in zip(active, done.samples, strict=True):
            proposals[one].tokens.append(sample.token)
            proposals[one].confidences.append(sample.confidence)
        self._planner.observe_draft(len(active), done.seconds)
        self._tier.end_step("draft", None)
        return True
