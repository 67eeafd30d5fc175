"""The stages of this room: ``corpus`` (sources -> corpus) and ``instructions`` (pairs, chats -> messages)."""

from __future__ import annotations

from puna.core.stage import Context, Input, Kind, Outcome, stage
from puna.data.settings import CorpusParameters, InstructionsParameters

_SIDES: dict[str, Kind] = {"train": "corpus", "held_out": "corpus"}


@stage("corpus", parameters=CorpusParameters, outputs=_SIDES)
def corpus(context: Context, parameters: CorpusParameters) -> Outcome:
    """Read sources into a corpus, split by source document and checked for leaks.

    Time grows linearly with the text; memory holds a hash per row and per held-out run of words.
    """
    from puna.data.build import build

    return build(parameters, context.out, seed=context.seed).outcome(context.report)


@stage(
    "instructions",
    parameters=InstructionsParameters,
    inputs={
        "pairs": Input("corpus", many=True, optional=True),
        "messages": Input("corpus", many=True, optional=True),
        "held_out": Input("corpus", many=True, optional=True),
    },
    outputs=_SIDES,
)
def instructions(context: Context, parameters: InstructionsParameters) -> Outcome:
    """Make conversations out of sentence pairs and mix in corpora of conversations.

    Time and memory grow linearly with the number of rows, which are held in memory to be shuffled.
    """
    from puna.data.instructions import build_instructions

    return build_instructions(parameters, context.inputs, context.out, seed=context.seed).outcome(
        context.report
    )
