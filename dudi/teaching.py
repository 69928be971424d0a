"""What the teacher says about the responses of a micro-batch, row by row of the student's.

A lesson is what the teacher reads: each response in its own tokens, under the verbalized prompt
and, where the two are compared, under the student's plain one. `teach` turns a lesson into hidden
states that pair with the student's rows and a weight for each row's divergence: 0 where the teacher
has no row at that byte or its first tokens are left out, less than 1 where the verbalized teacher
is less sure of the given response than the plain one.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dudi.bridge import Bridge
from dudi.config import DuDiConfig
from dudi.known import KnownTop, check_known
from dudi.meter import Meter
from dudi.pairing import Pairing
from dudi.rows import Reader, TeacherPrompts
from dudi.signals import Packed, lm_head, pack, response_hidden, vocab_size
from dudi.verbalize import CONTEXT_FIELDS, ContextVerbalizer
from dudi_kernels import LMHead, TopKTeacher, Verbalizer, linear_dudi_loss, linear_log_prob

TINY = 1e-12  # no 0 / 0
UNPAIRED_SEEN = 256  # responses before a share of them that don't pair says anything


class Responses(NamedTuple):
    """Of one micro-batch, as the student packs them."""

    ids: list[Tensor]  # in the student's tokens
    prompts: list[int]  # which prompt each belongs to
    segments: list[int]  # group i for y+ of prompt i, then its y-
    group: int = 2  # sequences of a prompt

    def sides(self, wanted: Sequence[int]) -> list[int]:
        """Which of the responses are y+ (0) or y- (1)."""
        return [i for i, s in enumerate(self.segments) if int(s % self.group > 0) in wanted]

    @property
    def samples(self) -> list[int]:
        """Which sample of the micro-batch each is; of y+, the first of its prompt."""
        each = self.group - 1
        return [
            p * each + max(s % self.group - 1, 0)
            for p, s in zip(self.prompts, self.segments, strict=True)
        ]

    @property
    def starts(self) -> list[int]:
        """Where the rows of each begin among the student's."""
        return [0, *accumulate(map(len, self.ids))][:-1]

    @property
    def rows(self) -> int:
        return sum(map(len, self.ids))


class Lesson(NamedTuple):
    seen: Packed  # under the prompts that the verbalizer made
    plain: Packed | None  # under the student's own: all of these, or those of y+
    student_rows: Tensor  # (P,) which rows of the student's have one of the teacher's
    teacher_rows: Tensor  # (P,) and which one that is
    weight: Tensor | None  # (N,) of each row's divergence; None: all rows are taught alike
    differs: int  # responses whose bytes the teacher's tokenizer changes
    whole: bool  # whether the teacher's rows are the student's as they come
    group: int  # sequences of a prompt
    top: TopKTeacher | None = None  # what a teacher of likeliest tokens has answered

    def taught(self, segment_ids: Tensor) -> Tensor:  # (2,)
        """How many rows of y+, and of y-, the divergence is of."""
        sides = (segment_ids % self.group > 0).long()
        return torch.bincount(sides, self.weight, minlength=2).float()


class Taught(NamedTuple):
    hidden: Tensor | TopKTeacher  # (N, E)
    head: LMHead | None  # None where likeliest tokens are all that is known
    weight: Tensor | None  # (N,)
    gate: Tensor | None  # (M,) of the teacher's rows of y+
    shift: Tensor | None  # (T,) how far the verbalized prompt moves the plain one's hidden states


def make_lesson(
    responses: Responses,
    sides: Sequence[int],  # which of y+ (0) and y- (1) the teacher scores
    seen: Sequence[Tensor],  # the verbalized ids of each prompt, or of each sample
    plain: Sequence[Tensor] | None,  # the plain ones of each prompt, where they are compared
    pairing: Pairing | None,
    pad_token_id: int,
    skip_tokens: int = 0,
    places: Sequence[int] | None = None,  # of each response in `seen`; None: its prompt's
    plain_sides: Sequence[int] = (0, 1),
) -> Lesson:
    scored = responses.sides(sides)
    own = [responses.ids[i] for i in scored]
    texts, rows, others, differs = _paired(own, pairing)
    segments = [responses.segments[i] for i in scored]
    of = places or responses.prompts
    packed = pack([seen[of[i]] for i in scored], texts, pad_token_id, segments)
    packed_plain = None
    if plain is not None:
        wanted = set(responses.sides(plain_sides))
        compared = [
            (plain[responses.prompts[i]], text, responses.segments[i])
            for i, text in zip(scored, texts, strict=True)
            if i in wanted
        ]
        prompts, own, numbers = (list(part) for part in zip(*compared, strict=True))
        packed_plain = pack(prompts, own, pad_token_id, numbers)
    starts = [responses.starts[i] for i in scored]
    student_rows = _joined([r + start for r, start in zip(rows, starts, strict=True)])
    begins = [0, *accumulate(map(len, texts))]
    teacher_rows = _joined([r + begin for r, begin in zip(others, begins, strict=False)])
    weight = None
    if skip_tokens or len(student_rows) < responses.rows:
        weight = torch.zeros(responses.rows)
        counted = _joined([r[r >= skip_tokens] + s for r, s in zip(rows, starts, strict=True)])
        weight[counted] = 1.0
    return Lesson(
        packed,
        packed_plain,
        student_rows,
        teacher_rows,
        weight,
        differs,
        len(student_rows) == responses.rows == begins[-1],
        responses.group,
    )


def _paired(
    own: list[Tensor], pairing: Pairing | None
) -> tuple[list[Tensor], list[Tensor], list[Tensor], int]:
    """Responses in the teacher's tokens, which of the student's rows pair, with which of them, and
    how many responses don't."""
    if pairing is None:
        rows = [torch.arange(len(ids)) for ids in own]
        return own, rows, rows, 0
    found = pairing(own)
    texts = [torch.tensor(ids, dtype=torch.long) for ids in found.teacher_ids]
    return texts, found.student_rows, found.teacher_rows, len(found.differs)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)


def answered(teacher: KnownTop, lesson: Lesson) -> tuple[Lesson, Mapping[int, str]]:
    """With what the teacher answers; segments that it has no usable answer to, and why. Their rows
    weigh nothing."""
    top, lost = teacher.top(lesson.seen)
    weight = lesson.weight
    if lost:
        gone = torch.isin(lesson.seen.segment_ids, torch.tensor(list(lost)))
        weight = torch.ones(len(gone)) if weight is None else weight.clone()
        weight[lesson.student_rows[gone]] = 0.0
    return lesson._replace(top=top, weight=weight), lost


@torch.no_grad()
def teach(
    teacher: Any,
    lesson: Lesson,
    rows: int,  # of the student
    device: torch.device,
    verbalized_share: float = 1.0,
    confidence_gating: float = 0.0,
    padding_free: bool = False,
    **options: Any,  # of linear_log_prob
) -> Taught:
    """Hidden states for the student's rows, and the weights of their divergences; of a teacher of
    likeliest tokens, these."""
    if isinstance(teacher, KnownTop):
        if lesson.top is None:
            lesson, lost = answered(teacher, lesson)
            if lost:
                told = f"{len(lost)} of {int(lesson.seen.segment_ids.unique().numel())} responses"
                warnings.warn(f"{told} are left out: {next(iter(lost.values()))}", stacklevel=2)
        assert lesson.top is not None
        weight = None if lesson.weight is None else lesson.weight.to(device)
        top = lesson.top if lesson.whole else lesson.top.spread(lesson.student_rows, rows)
        return Taught(top.to(device), None, weight, None, None)
    head = lm_head(teacher)
    seen = lesson.seen.to(device)
    hidden = response_hidden(teacher, seen, padding_free)
    gate = shift = None
    if lesson.plain is not None:
        other = lesson.plain.to(device)
        plain = response_hidden(teacher, other, padding_free)
        own = hidden[torch.isin(seen.segment_ids, other.segment_ids)]
        shift = (own - plain).float().norm(dim=1) / plain.float().norm(dim=1).clamp(min=TINY)
        if confidence_gating:
            given = other.segment_ids % lesson.group == 0
            verbalized_says, plain_says = (
                linear_log_prob(states[given], head, other.targets[given], **options)
                for states in (own, plain)
            )
            gate = confidence(verbalized_says, plain_says, confidence_gating)
        if verbalized_share < 1:  # the plain one has read all
            hidden = torch.lerp(plain, hidden, verbalized_share)
    weight = None if lesson.weight is None else lesson.weight.to(device)
    student_rows, teacher_rows = lesson.student_rows.to(device), lesson.teacher_rows.to(device)
    if gate is not None:
        factor = torch.ones(len(hidden), device=device)
        factor[seen.segment_ids % lesson.group == 0] = gate
        weight = torch.ones(rows, device=device) if weight is None else weight
        weight = weight.index_copy(0, student_rows, weight[student_rows] * factor[teacher_rows])
    if not lesson.whole:
        whole = hidden.new_zeros(rows, hidden.shape[1])
        hidden = whole.index_copy_(0, student_rows, hidden[teacher_rows])
    return Taught(hidden, head, weight, gate, shift)


def confidence(verbalized: Tensor, plain: Tensor, power: float) -> Tensor:
    """min(1, p_verbalized / p_plain) ** power, of log-probabilities."""
    gain = (verbalized - plain).nan_to_num(0)  # -inf of both: neither is less sure
    return (power * gain.clamp(max=0)).exp()


class Teaching:
    """Lessons for the micro-batches of a run, and what it measures of them."""

    def __init__(
        self,
        bridge: Bridge,
        verbalizer: ContextVerbalizer | None,
        args: DuDiConfig,
        tokenizer: Any,  # the student's
        meter: Meter,
        dataset: Any,  # as given, for templates that show a sample
    ) -> None:
        self.bridge, self.verbalizer, self.args = bridge, verbalizer, args
        self.tokenizer, self.meter, self.dataset = tokenizer, meter, dataset
        self.unpaired = torch.zeros(2, dtype=torch.long)  # responses that don't pair, and all
        reader = Reader(
            bridge.tokenizer, args.chat_template_kwargs or {}, args.max_teacher_prompt_length
        )
        self.prompts = TeacherPrompts(reader, verbalizer)

    def lesson(
        self,
        responses: Responses,
        rows: Sequence[int],  # of the dataset
        seen: Sequence[Tensor],
        plain: Sequence[Tensor],
        completions: Sequence[Tensor],  # the samples, those of one prompt together
    ) -> Lesson:
        shows_samples = self.verbalizer is not None and self.verbalizer.reads_samples
        if shows_samples:
            seen = self.prompts_with(rows, completions)
        lesson = make_lesson(
            responses,
            self.args.taught_sides,
            seen,
            plain if self.args.needs_plain_teacher else None,
            self.bridge.pairing,
            self.tokenizer.pad_token_id,
            self.args.teacher_skip_tokens,
            responses.samples if shows_samples else None,
            self.args.plain_sides,
        )
        if self.bridge.pairing is not None:
            self._count_pairs(lesson, responses)
        return lesson

    def prompts_with(self, rows: Sequence[int], completions: Sequence[Tensor]) -> list[Tensor]:
        """Prompts that show what the student has just written, sample by sample."""
        each = len(completions) // len(rows)
        texts = [self.tokenizer.decode(c, skip_special_tokens=True) for c in completions]
        return [
            torch.tensor(self.prompts.verbalized(self.dataset[rows[i // each]], text).ids)
            for i, text in enumerate(texts)
        ]

    def _count_pairs(self, lesson: Lesson, responses: Responses) -> None:
        lengths = [len(responses.ids[i]) for i in responses.sides(self.args.taught_sides)]
        self.meter.add("paired_rows", len(lesson.student_rows), sum(lengths))
        self.meter.add("unpaired_responses", lesson.differs, len(lengths))
        self.unpaired += torch.tensor([lesson.differs, len(lengths)])
        differs, seen = self.unpaired.tolist()
        if seen >= UNPAIRED_SEEN and differs > self.args.max_unpaired * seen:
            raise ValueError(
                f"the teacher's tokenizer changes the bytes of {differs} of {seen} responses (it "
                f"normalizes text): more than max_unpaired={self.args.max_unpaired} allows"
            )

    def teach(self, teacher: Any, lesson: Lesson, rows: int, device: torch.device) -> Taught:
        a = self.args
        taught = teach(
            teacher,
            lesson,
            rows,
            device,
            a.verbalized_share,
            a.confidence_gating,
            a.padding_free,
            memory_budget=a.memory_budget,
        )
        if taught.shift is not None:
            self.meter.add("verbalizer_shift", taught.shift.sum(), len(taught.shift))
        if taught.gate is not None:
            self.meter.add("confidence_gate", taught.gate.sum(), len(taught.gate))
        return taught

    def map_on(self, device: torch.device) -> Verbalizer | None:
        """The map between the vocabularies, moved once."""
        self.bridge = self.bridge.to(device)
        return self.bridge.verbalizer

    def record(self, entropy: Tensor, lesson: Lesson, packed: Packed) -> None:
        """Of how many rows that pair the teacher says anything, and how sure it is of them."""
        rows = float(lesson.taught(packed.segment_ids.cpu()).sum())
        if lesson.weight is not None:
            entropy = entropy * lesson.weight.to(entropy.device)
        if self.args.teacher_skip_tokens:
            self.meter.add("taught_rows", rows, len(lesson.student_rows))
        self.meter.add("teacher_entropy", entropy.sum(), rows)


# ---- what is checked before a run ----------------------------------------------------------------


def wants_verbalizer(args: DuDiConfig, columns: Collection[str]) -> bool:
    if args.context_verbalizer is not None:
        return args.context_verbalizer
    return "language" in columns and not set(CONTEXT_FIELDS).isdisjoint(columns)


def context_verbalizer(args: DuDiConfig, dataset: Any) -> ContextVerbalizer | None:
    """What a run's teacher reads is made with; None where it reads the student's prompt."""
    columns = set(getattr(dataset, "column_names", None) or ())
    if not args.needs_teacher:
        return None
    if not wants_verbalizer(args, columns):
        if args.needs_plain_teacher:
            raise ValueError(
                "verbalized_share < 1 and confidence_gating > 0 need the context verbalizer: "
                "without it the teacher reads the student's prompt alone"
            )
        return None
    verbalizer = ContextVerbalizer(args.verbalizer_templates, args.verbalizer_chain)
    if verbalizer.reads_samples and not args.needs_samples:
        raise ValueError(
            "a verbalizer template shows student_completion, but no samples are drawn: "
            "on_policy_weight or preference_weight must be positive"
        )
    if verbalizer.reads_samples and "completion_ids" in columns:
        raise ValueError(
            "train_dataset must not be prepared already: a verbalizer template shows "
            "student_completion, which the teacher's prompts are made with in each step"
        )
    return verbalizer


def signal_options(args: DuDiConfig) -> dict[str, Any]:
    """Of `linear_dudi_loss`, what the teacher's signals are."""
    off_divergence, on_divergence, beta = args.kd_divergences
    return {
        "off_policy_divergence": off_divergence,
        "on_policy_divergence": on_divergence,
        "beta": beta,
        "alpha": args.alpha,
        "temperature": args.temperature,
        "teacher_temperature": args.teacher_temperature,
        "teacher_top_p": args.teacher_top_p,
        "gradient_tolerance": args.gradient_tolerance,
        "memory_budget": args.memory_budget,
    }


@torch.no_grad()
def check_signals(student: Any, teacher: Any, bridge: Bridge, args: DuDiConfig) -> None:
    """Raise what the loss would say in the first step, from a batch without rows."""
    if isinstance(teacher, KnownTop):
        mapped = bridge.pairing is not None or bridge.verbalizer is not None
        return check_known(teacher, mapped, args, vocab_size(student))
    scored = args.preference_weight > 0 and args.reference == "teacher"
    if scored and (bridge.pairing is not None or bridge.maps_tokens):
        raise ValueError(
            "reference must not be 'teacher' where the teacher has another tokenizer, or a map "
            "between the vocabularies: its log-probabilities are of other tokens; use initial, "
            "lagged or none"
        )
    heads = [lm_head(student), lm_head(teacher)]
    devices = {head.weight.device for head in heads}
    if len(devices) > 1:  # accelerate will bring them together
        return
    device = devices.pop()
    hidden = [head.weight.new_zeros(0, head.width) for head in heads]
    none = torch.zeros(0, dtype=torch.long, device=device)
    v = bridge.verbalizer
    linear_dudi_loss(
        hidden[0],
        heads[0],
        hidden[1],
        heads[1],
        none,
        none,
        verbalizer=None if v is None else v.to(device),
        off_policy_weight=args.off_policy_weight,
        on_policy_weight=args.on_policy_weight,
        **signal_options(args),
    )
