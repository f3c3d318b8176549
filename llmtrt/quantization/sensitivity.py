"""How much the model's predictions suffer from each form that a matrix could take, measured in one pass there and back."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llmtrt.progress import Report, silent
from llmtrt.quantization.precision import INT8, Form
from llmtrt.quantization.scales import expanded, quantize, rounded, search_scales
from llmtrt.quantization.torch_graph import Values
from llmtrt.quantization.torch_model import Layer, LayerwiseModel

_SEED = 0


def sensitivities(
    model: LayerwiseModel, ids: Tensor, forms: Mapping[str, Sequence[Form]], dtype: torch.dtype, report: Report = silent
) -> dict[str, dict[Form, float]]:
    """The KL divergence from the unquantized model that each of ``forms`` of each weight is expected to cost by itself, in
    nats a token, to second order: Σₙ E[gₙ²] E[(Δₙ x)²] / 2 over the outputs n of its product, where Δ is the form's rounding
    error, x the input, and g the gradient of the log-likelihood of tokens that are drawn from the model's own predictions
    (the diagonal of the Fisher information, by which BRECQ, https://arxiv.org/abs/2102.05426, weighs outputs too), with
    inputs and gradients taken to be independent.

    ``ids`` [n, S]: token sequences; the hidden states of each after every layer are held. One layer's weights at a time.
    """
    sequences, total = ids.split(1), 2 * len(model.layers)
    errors: dict[str, dict[Form, Tensor]] = {}
    hidden, shared = [], []
    with torch.no_grad():
        for sequence in sequences:
            values = model.start(sequence)
            hidden.append([values.pop(model.layers[0].input)])
            shared.append(values)
        for index, layer in enumerate(model.layers):
            report(index, total, "measuring sensitivity")
            model.enter(layer)
            ends, squares = _forward(model, layer, shared, [states[-1] for states in hidden])
            for states, end in zip(hidden, ends):
                states.append(end)
            for name, square in squares.items():
                weight = model.weight(name)
                errors[name] = {form: _error(weight, square, form, dtype) for form in forms.get(name, ())}
    draw = torch.Generator().manual_seed(_SEED)
    gradients = [_at_the_end(model, states.pop(), sequence, draw) for states, sequence in zip(hidden, sequences)]
    found: dict[str, dict[Form, float]] = {}
    for index, layer in reversed(list(enumerate(model.layers))):
        report(total - index - 1, total, "measuring sensitivity")
        model.enter(layer)
        gradients, fisher = _backward(model, layer, shared, [states.pop() for states in hidden], gradients)
        for name, square in fisher.items():
            found[name] = {form: float(square @ error) / 2 for form, error in errors[name].items()}
    return {name: found[name] for name in forms}


def _forward(
    model: LayerwiseModel, layer: Layer, shared: Sequence[Values], states: Sequence[Tensor]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The hidden states after ``layer``, and E[x xᵀ] of each product's inputs by the weight's name."""
    ends, squares, tokens = [], {}, sum(state.shape[0] * state.shape[1] for state in states)
    for values, state in zip(shared, states):
        values = values | {layer.input: state}
        for stage in layer.stages:
            values = model.run(stage.nodes, values)
            if stage.weights:
                x = values[stage.read].reshape(-1, model.weight(stage.weights[0]).shape[1])
                square = squares.setdefault(stage.weights[0], x.new_zeros(x.shape[1], x.shape[1]))
                square.addmm_(x.T, x, alpha=1 / tokens)
        ends.append(values[layer.output])
    for stage in layer.stages:
        squares |= {name: squares[stage.weights[0]] for name in stage.weights}
    return ends, squares


def _error(weight: Tensor, square: Tensor, form: Form, dtype: torch.dtype) -> Tensor:
    """E[(Δₙ x)²] of each output n, where ``form`` is chosen by rounding to nearest."""
    if form == INT8:
        scale = rounded(weight.abs().amax(1, keepdim=True) / 127, dtype)
        back = (weight / scale.clamp_min(torch.finfo(torch.float32).tiny)).round_().clamp_(-127, 127) * scale
    else:
        scale = expanded(search_scales(weight, square.diagonal(), form.block, dtype), form.block)
        back = quantize(weight, scale) * scale
    wrong = weight - back
    return (wrong @ square * wrong).sum(1)


def _at_the_end(model: LayerwiseModel, state: Tensor, ids: Tensor, draw: torch.Generator) -> Tensor:
    """The gradient at the hidden states after the last layer, of the log-likelihood of drawn tokens, summed over rows."""
    state = state.requires_grad_()
    logits = model.finish(state, ids).flatten(0, 1)
    drawn = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=draw).to(logits.device)
    chosen = logits.log_softmax(1).gather(1, drawn).sum()
    return torch.autograd.grad(chosen, state)[0]


def _backward(
    model: LayerwiseModel, layer: Layer, shared: Sequence[Values], states: Sequence[Tensor], gradients: Sequence[Tensor]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The gradients at the hidden states before ``layer``, and E[gₙ²] at each output of its products."""
    before, fisher, tokens = [], {}, sum(state.shape[0] * state.shape[1] for state in states)
    for values, state, gradient in zip(shared, states, gradients):
        state = state.requires_grad_()
        values = values | {layer.input: state}
        for stage in layer.stages:
            values = model.run(stage.nodes, values)
        names = {name: output for stage in layer.stages for name, output in stage.products.items()}
        wanted = [state, *(values[output] for output in names.values())]
        first, *others = torch.autograd.grad(values[layer.output], wanted, gradient)
        before.append(first)
        for name, at in zip(names, others):
            square = at.reshape(-1, at.shape[-1]).square().sum(0) / tokens
            fisher[name] = fisher[name] + square if name in fisher else square
    return before, fisher
