"""Why a token went where it went: what would have been, had each choice been forbidden."""

from __future__ import annotations

from typing import final

from mixtura.errors import UserError, check_range
from mixtura.methods.analyses import Analysis, Evidence, Report, Study, Table
from mixtura.methods.analyses._counterfactuals import Edge, edges_of, influence_map, loss_of

METHOD = {
    "paper": 124,
    "title": "RouteExplainer: An Explanation Framework for Vehicle Routing Problem",
    "tags": ["needs:study", "steers"],
}
_MATTERS = 0.01
_CONTEXT = 8
_COLUMNS = (
    "layer",
    "expert",
    "weight",
    "influence",
    "chosen instead",
    "guess without it",
    "mostly used by",
)


@final
class RouteExplainer(Analysis):
    """Explain one token's route: which of its experts mattered for what comes next, in a sentence and a map.

    One choice after the other is forbidden, of this token alone: its router chooses again, all later layers
    go on from there, and the loss of the token that really follows (nats) is compared. ``influence`` is how
    much it rises: more than 0 where the choice helped, less where another expert would have done better. The
    token is number ``token`` of the sequence ``text``, both counted from 0; -1 is the last one that has a
    successor.

    Each expert's use is said, too, by the domain that chooses it most often, where a trace knows.

    Shapes:
        A model of L layers and one token to L rows, a table of L * K choices and a map of them.

    Raises:
        SettingError: a setting is out of range.
        UserError: there is no such text, or no such token with a successor.

    Example:
        >>> RouteExplainer(text=1, token=5).token
        5

    Differences from the paper:
        The paper explains routes of vehicles, and is no analysis of experts; kept are a route as a row of
        actions, the influence of each by a counterfactual, the intention behind it and the sentence. The
        intention is the domain that uses the expert most instead of a trained classifier's answer, and the
        sentence is made by rule instead of by a language model.

    Reference:
        RouteExplainer: An Explanation Framework for Vehicle Routing Problem (paper 124).
    """

    def __init__(self, *, text: int = 0, token: int = -1) -> None:
        check_range("RouteExplainer", "text", text, 0, 1 << 40)
        check_range("RouteExplainer", "token", token, -1, 1 << 40)
        self.text = text
        self.token = token

    def measure(self, evidence: Evidence) -> Report:
        study = evidence.model()
        ids, place = self._place(study)
        prefix, after = list(ids[: place + 1]), ids[place + 1]
        plain = study.run([prefix], steering=[{}])[0]
        edges = edges_of(study, evidence, prefix, after, plain)
        rows = []
        for layer in study.layers:
            found = [e.influence for e in edges if e.layer == layer.index and e.influence is not None]
            most = max(found, key=abs) if found else None
            rows.append({"layer": layer.index, "influence": most, "choices": len(found)})
        known = [edge.influence for edge in edges if edge.influence is not None]
        scalars = {
            "loss": loss_of(plain, after),
            "largest": max(known, default=None),
            "smallest": min(known, default=None),
            "helped": sum(one > _MATTERS for one in known),
            "hindered": sum(one < -_MATTERS for one in known),
        }
        word, following = study.words([prefix[-1], after])
        context = "".join(study.words(prefix[-_CONTEXT:]))
        table = Table(
            title=f"Choices of {word!r}, token {place} of text {self.text}",
            columns=_COLUMNS,
            rows=tuple((e.layer, e.expert, e.weight, e.influence, e.instead, e.guess, e.use) for e in edges),
        )
        told = _told(edges, context, following, study.words([int(plain.logits[-1].argmax())])[0])
        return Report(scalars, tuple(rows), told, (table,), (influence_map(study, edges),))

    def _place(self, study: Study) -> tuple[tuple[int, ...], int]:
        if self.text >= len(study.passages):
            raise UserError(f"there is no text {self.text}; there are {len(study.passages)}, counted from 0")
        ids = study.passages[self.text].token_ids
        place = len(ids) - 2 if self.token == -1 else self.token
        if not 0 <= place < len(ids) - 1:
            raise UserError(
                f"token {self.token} of text {self.text} has no successor to compare; the text has "
                f"{len(ids)} tokens, so give one from 0 to {len(ids) - 2}"
            )
        return ids, place


def _told(edges: list[Edge], context: str, following: str, guess: str) -> tuple[str, ...]:
    known = sorted((e for e in edges if e.influence is not None), key=lambda e: -abs(e.influence or 0))
    begun = f"After {context!r} comes {following!r}, and the model guesses {guess!r}"
    if not known or abs(known[0].influence or 0) <= _MATTERS:
        return (f"{begun}; no single choice of an expert changes the loss by more than {_MATTERS} nats.",)
    top = known[0]
    way, how = ("helped", "higher") if (top.influence or 0) > 0 else ("hindered", "lower")
    change = f"the guess would be {top.guess!r}" if top.guess != guess else "the guess would stay"
    use = f", which is mostly used by {top.use}," if top.use else ""
    return (
        f"{begun}. Expert {top.expert} of layer {top.layer}{use} {way} most: without it the loss would be "
        f"{abs(top.influence or 0):.3g} nats {how}, expert {top.instead or 'none'} would take its place, and "
        f"{change}.",
    )
