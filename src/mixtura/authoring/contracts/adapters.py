"""What every adapter promises, in small models of transformers under PEFT."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor

from mixtura.authoring.contracts import _adapted
from mixtura.authoring.contracts._adapted import adapted, apart, batch, families, gradients, logits
from mixtura.authoring.contracts._core import Subject, require
from mixtura.errors import UserError
from mixtura.machine.releases import checkpoint_layers, returned_cache, with_cache
from mixtura.methods import kind
from mixtura.methods.adapters import Adapter
from mixtura.types import Change, LowRank, Own, RouterInput, Site

_IMPLEMENTATIONS = ("mixtura", "eager")
_ROUNDING = 2e-5
# What coefficients of losses are called.
_LOSSES = ("balance", "sharpness", "uncertainty")


def arguments_of(method: Subject) -> tuple[Site]:
    """A site of the kind that the method changes."""
    kinds = ("experts", "block", "linear")
    return (_adapted.site(next(kind for kind in kinds if changes(method, kind))),)


def changes(method: Subject, kind: str) -> bool:
    """Whether the method is for sites of a kind."""
    return method.has(f"changes:{kind}") or method.has(f"changes:{kind}s")


def sample(method: Subject, seed: int) -> RouterInput:
    """Twelve tokens."""
    del method
    generator = torch.Generator().manual_seed(seed)
    return RouterInput.of(torch.randn(12, 32, generator=generator), token_ids=torch.arange(12))


def use(adapter: Adapter, given: RouterInput) -> Change:
    """What it changes."""
    return adapter.change(given)


def check_tags_are_known(method: Subject) -> None:
    """Every tag is one of the kind's, and one says what is changed."""
    for tag in method.header.tags:
        require(kind("adapters").explain(tag) is not None, f"no adapter has a tag {tag!r}")
    changed = set(method.tagged("changes"))
    known = {"experts", "linear", "blocks"}
    require(changed and changed <= known, f"the tags need one of changes:{', changes:'.join(sorted(known))}")
    scopes = set(method.tagged("shares"))
    require(len(scopes) < 2 and scopes <= {"layer", "role", "model"}, f"sites cannot share by {scopes}")


def check_another_site_is_refused(method: Subject) -> None:
    """At a site of another kind than it changes the method raises `UserError` that names the site."""
    for other in ("experts", "linear", "block"):
        if changes(method, other):
            continue
        site = _adapted.site(other)
        try:
            method.cls(site)
        except UserError as error:
            require(site.name in str(error), f"the error must name the site, got: {error}")
        else:
            require(False, f"it takes a site of {other}, which it does not change")


def check_change_fits_the_site(method: Subject) -> None:
    """What is changed has the sizes of the site's matrices, and names experts that are there, each once."""
    (site,) = arguments_of(method)
    made = use(method.create(), sample(method, 20))
    require(made.matrices or made.extra is not None, "it changes no matrix, and adds nothing besides")
    if made.extra is not None:
        wanted = (12, site.matrices["weight"].rows)
        require(tuple(made.extra.shape) == wanted, f"it adds {tuple(made.extra.shape)} in place of {wanted}")
    for name, part in made.matrices.items():
        require(name in site.matrices, f"it changes {name!r}, and the site has {', '.join(site.matrices)}")
        shape = site.matrices[name]
        if isinstance(part, Own):
            require(part.weight.shape[1:] == shape.stored, f"{name} is of shape {tuple(part.weight.shape)}")
        else:
            fits = part.a.shape[2] == shape.cols and part.b.shape[1] == shape.rows
            counts = {len(part.a), len(part.b), len(part.scale)}
            same = part.a.shape[1] == part.b.shape[2] and len(counts) == 1
            require(fits and same, f"the factors of {name} do not fit each other or the matrix")
        if site.kind == "experts":
            count = len(part.weight if isinstance(part, Own) else part.a)
            require(count == len(made.expert_ids), f"{name} has {count} entries for {made.expert_ids}")
    ids = made.expert_ids
    require(len(set(ids)) == len(ids) and all(0 <= e < site.num_experts for e in ids), f"experts are {ids}")


def check_starts_as_the_base(method: Subject) -> None:
    """At its start an adapted model predicts what the base does, to the bit, trained or not."""
    ids = batch(1)
    for family in families(method):
        for implementation in _IMPLEMENTATIONS:
            plain = _adapted.base(family, implementation)
            model = adapted(method, family, implementation, started=False)
            require(
                torch.equal(logits(model, ids), logits(plain, ids)),
                f"it changes what {family} predicts before it has learned anything ({implementation})",
            )
            # So that experts run by the same kernels, whichever layer the first trained parameter is in.
            model.enable_input_require_grads()
            plain.enable_input_require_grads()
            first, second = (one(input_ids=ids).logits for one in (model, plain))
            require(torch.equal(first, second), f"with gradients it changes {family} at its start")


def check_changes_something(method: Subject) -> None:
    """With other values than at its start an adapter changes what is predicted; switched off, nothing."""
    for family in families(method):
        base, model, moved = _adapted.base(family), adapted(method, family), 0.0
        # What is given to some texts only need not change the first.
        for seed in range(2, 8):
            ids = batch(seed)
            plain = logits(base, ids)
            moved = max(moved, float((logits(model, ids) - plain).abs().max()))
            with model.disable_adapter():
                require(torch.equal(logits(model, ids), plain), f"switched off it still changes {family}")
            if moved > 1e-4:
                break
        require(moved > 1e-4, f"nothing in {family} depends on its parameters")


def check_only_the_adapter_learns(method: Subject) -> None:
    """Every parameter of the adapter gets a finite gradient, and nothing of the base gets one."""
    for family in families(method):
        model = adapted(method, family).train()
        found = gradients(model, batch(3, rows=4))
        own = {name for name, _ in model.named_parameters() if "mixtura_adapter" in name}
        require(own, f"no parameter of {family} belongs to it")
        require(not found.keys() - own, f"of the base {sorted(found.keys() - own)[:1]} gets a gradient")
        require(not own - found.keys(), f"{sorted(own - found.keys())[:1]} gets no gradient")
        bad = [name for name, value in found.items() if not value.isfinite().all()]
        require(not bad, f"the gradient of {bad[:1]} is not finite")
        require(any(value.abs().max() > 0 for value in found.values()), "all gradients are zero")


def check_gradients_are_right(method: Subject) -> None:
    """Gradients by the kernels are those by matrices that were built, in transformers' own loop."""
    for family in families(method):
        ids = batch(4)
        first, second = (
            gradients(adapted(method, family, implementation).double(), ids)
            for implementation in _IMPLEMENTATIONS
        )
        require(apart(first, second) < 1e-7, f"gradients in {family} differ by {apart(first, second):.1e}")


def check_learns(method: Subject) -> None:
    """A few steps of AdamW lower the loss on what is trained on."""
    for family in families(method):
        model, ids = adapted(method, family, started=False).train(), batch(5, rows=4)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
        losses = []
        with _adapted.undisturbed():
            for _ in range(12):
                loss = model(input_ids=ids, labels=ids).loss
                losses.append(float(loss))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        require(losses[-1] < losses[0] - 1e-3, f"in {family} the loss goes from {losses[0]} to {losses[-1]}")


def check_saves_and_loads(method: Subject) -> None:
    """Saved and loaded by PEFT, also under another name beside another one, it predicts the same bits."""
    from peft import PeftModel

    ids = batch(6)
    for family in families(method):
        model = adapted(method, family)
        wanted = logits(model, ids)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            again = PeftModel.from_pretrained(_adapted.base(family), folder).eval()
            require(torch.equal(logits(again, ids), wanted), f"loaded into {family} it predicts other bits")
            other = adapted(method, family, started=False)
            begun = logits(other, ids)
            other.load_adapter(folder, adapter_name="second")
            require(torch.equal(logits(other, ids), begun), "loading a second one changes the first")
            other.set_adapter("second")
            require(torch.equal(logits(other.eval(), ids), wanted), "switched to, it predicts other bits")
            other.set_adapter("default")
            require(torch.equal(logits(other, ids), begun), "switched back, the first one has changed")
            other.delete_adapter("second")
            require(torch.equal(logits(other, ids), begun), "taking the second one out changes the first")


def check_merges(method: Subject) -> None:
    """Merged it predicts the same but for rounding, and taken back the very same; or it refuses to merge."""
    ids = batch(7)
    for family in families(method):
        model = adapted(method, family)
        wanted, plain = logits(model, ids), logits(_adapted.base(family), ids)
        if not method.has("mergeable"):
            _require_no_merge(model)
            require(torch.equal(logits(model, ids), wanted), "refusing to merge changes the model")
            continue
        model.merge_adapter()
        _require_near(logits(model, ids), wanted, f"merged into {family}")
        model.unmerge_adapter()
        require(torch.equal(logits(model, ids), wanted), "unmerged it predicts other bits than before")
        _require_near(logits(model.merge_and_unload(), ids), wanted, f"merged into {family} and unloaded")
        left = adapted(method, family).unload()
        require(torch.equal(logits(left, ids), plain), "unloaded, the base is not what it was")


def _require_no_merge(model: Any) -> None:
    try:
        model.merge_adapter()
    except UserError:
        return
    require(False, "it merges without the tag mergeable")


def _require_near(made: Tensor, wanted: Tensor, what: str) -> None:
    error = float((made - wanted).abs().max() / wanted.abs().max())
    require(error < _ROUNDING, f"{what} it is off by {error:.1e} of the largest logit")


def check_causal(method: Subject) -> None:
    """Predictions do not depend on later tokens, unless the method looks ahead."""
    if method.has("looks_ahead"):
        return
    for family in families(method):
        model, ids = adapted(method, family), batch(8)
        other = ids.clone()
        other[:, 5:] = batch(9)[:, 5:]
        _require_near(logits(model, other)[:, :5], logits(model, ids)[:, :5], "with other tokens later on")


def check_prompt_decides(method: Subject) -> None:
    """What decides by the prompt reads nothing of the answers, and decides the same in pieces."""
    if not method.has("per_prompt"):
        return
    for family in families(method):
        model, ids = adapted(method, family), batch(14)
        labels = ids.clone()
        labels[:, :4] = -100
        with torch.no_grad():
            whole = model(input_ids=ids, labels=labels).logits
            other = ids.clone()
            other[:, 6:] = batch(15)[:, 6:]
            changed = model(input_ids=other, labels=torch.where(labels < 0, labels, other)).logits
            _require_near(changed[:, :6], whole[:, :6], "with another answer later on")
            cache = None
            parts = []
            for start, stop in ((0, 4), (4, 5), (5, 9)):
                made = model(input_ids=ids[:, start:stop], use_cache=True, **with_cache(cache))
                cache = returned_cache(made)
                parts.append(made.logits)
        _require_near(torch.cat(parts, dim=1), whole, "with the answer behind a cache")


def check_batch_invariant(method: Subject) -> None:
    """A sequence's predictions depend neither on the others of the batch nor on padding."""
    if method.has("batch_dependent"):
        return
    for family in families(method):
        model, ids = adapted(method, family), batch(10)
        alone = logits(model, ids[:1])
        _require_near(logits(model, ids)[:1], alone, "beside another sequence")
        padded = torch.cat([ids.new_zeros(1, 3), ids[:1]], dim=1)
        mask = (torch.arange(padded.shape[1]) >= 3).long()[None]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            made = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits
        _require_near(made[:, 3:], alone, "after padding")


def check_recomputed_layers(method: Subject) -> None:
    """Layers that are computed again in the backward pass, reentrant or not, give the same gradients."""
    for family in families(method):
        ids = batch(11)
        settings = _without(method, "dropout")
        wanted = gradients(adapted(method, family, **settings).train(), ids)
        for reentrant in (False, True):
            model = adapted(method, family, **settings).train()
            model.enable_input_require_grads()
            checkpoint_layers(model, use_reentrant=reentrant)
            found = gradients(model, ids)
            require(found.keys() == wanted.keys(), f"computed again, gradients are missing in {family}")
            require(apart(wanted, found) < 1e-4, f"computed again, gradients differ ({family}, {reentrant=})")


def check_micro_batches(method: Subject) -> None:
    """Gradients of parts of a batch, each divided by all its labels, add up to those of the batch."""
    if method.has("batch_dependent"):
        return
    for family in families(method):
        ids = batch(12, rows=4)
        labels = torch.tensor(ids[:, 1:].numel())
        # Losses over how experts are used are of a part's own tokens.
        model = adapted(method, family, **_without(method, "dropout", *_LOSSES)).train()
        whole = gradients(model, ids, num_items_in_batch=labels)
        parts = [gradients(model, part, num_items_in_batch=labels) for part in (ids[:1], ids[1:])]
        summed = {name: parts[0][name] + parts[1][name] for name in whole}
        require(apart(whole, summed) < 1e-3, f"in {family} parts differ by {apart(whole, summed):.1e}")


def check_low_precision(method: Subject) -> None:
    """In a base of 16 bits, and under autocast, its parameters are float32 and its gradients finite."""
    for family in families(method):
        from peft import get_peft_model

        model = get_peft_model(_adapted.base(family).bfloat16(), _adapted.config_of(method)).train()
        _adapted.stir(model)
        own = [p for n, p in model.named_parameters() if "mixtura_adapter" in n]
        require({p.dtype for p in own} == {torch.float32}, "its parameters are not in float32")
        require(_finite(gradients(model, batch(13))), f"in bfloat16 gradients of {family} are not finite")
        mixed = adapted(method, family).train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            require(_finite(gradients(mixed, batch(13))), "under autocast gradients are not finite")


def _without(method: Subject, *names: str) -> dict[str, Any]:
    """Settings by which these do nothing, where the method has them."""
    return {setting.name: 0.0 for setting in method.header.settings if setting.name in names}


def _finite(found: dict[str, Tensor]) -> bool:
    return bool(found) and all(value.isfinite().all() for value in found.values())


def check_expands_to_lora(method: Subject) -> None:
    """What is tagged so has factors for every matrix it changes, whatever the tokens."""
    if not method.has("expands_to_lora"):
        return
    made = use(method.create(), RouterInput.of(torch.empty(0, 32)))
    require(all(isinstance(part, LowRank) for part in made.matrices.values()), "it has more than factors")
    require(made.shares is None and made.base_scale is None, "tokens or the base's factor decide over it")
