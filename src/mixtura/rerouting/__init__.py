"""Other routers, balanced training and replayed choices in any transformers MoE model.

The model keeps its class, its checkpoint format and its training loop, and `restore` takes it all back.

>>> import mixtura, torch
>>> from transformers import OlmoeConfig, OlmoeForCausalLM
>>> config = OlmoeConfig(
...     vocab_size=16, hidden_size=8, intermediate_size=4, num_hidden_layers=2,
...     num_attention_heads=2, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
...     pad_token_id=0, eos_token_id=1,
... )
>>> model = OlmoeForCausalLM(config)
>>> text = torch.tensor([[3, 4, 5, 6, 7, 8]])

Another router in place of the model's own, on the model's own weights:

>>> _ = mixtura.set_router(model, "top_p", p=0.4)
>>> model(text).logits.shape
torch.Size([1, 6, 16])
>>> mixtura.restore(model)

Balanced fine-tuning, here in a loop of one's own (a `Trainer` takes ``callbacks=[balanced.callback]``):

>>> balanced = mixtura.balance(model.train(), "loss_free", rate=0.01)
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
>>> model(text, labels=text).loss.backward()
>>> optimizer.step(); balanced.end_step(); optimizer.zero_grad()
>>> sorted(balanced.biases())
[0, 1]
>>> mixtura.restore(model)

Training on the experts that were chosen when a text was generated:

>>> with mixtura.record_routing(model.eval()) as recording:
...     written = model.generate(text, max_new_tokens=3, do_sample=False, eos_token_id=None)
>>> with mixtura.replay_routing(model.train(), recording):
...     model(written, labels=written).loss.backward()
"""

from __future__ import annotations

from mixtura.rerouting.balancing import Balance, balance
from mixtura.rerouting.core import Rerouting, restore
from mixtura.rerouting.replaying import Recording, record_routing, replay_routing
from mixtura.rerouting.restoring import load_router
from mixtura.rerouting.swapping import set_router

__all__ = [
    "Balance",
    "Recording",
    "Rerouting",
    "balance",
    "load_router",
    "record_routing",
    "replay_routing",
    "restore",
    "set_router",
]
