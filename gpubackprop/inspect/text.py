"""The text on backpropagation, in its own words and order, for a given network: nine parts of equations, numbers and checks."""

from __future__ import annotations

from gpubackprop.inspect.chain_rule import scalar_chain_rule, vector_chain_rule
from gpubackprop.inspect.notation import Notation, derivative_in_words, times
from gpubackprop.inspect.page import Arrays, Block, Formula, Item, Note, Page, Pair, Stage, Table, Words, number
from gpubackprop.inspect.walk import ETA, N_ITER_NO_CHANGE, TOL, Walk

SHOWN = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500)
"""Iterations whose loss is shown, seven of them at most, and the last."""


def speak(walk: Walk, remarks: str = "") -> tuple[Page, bool]:
    """Return the page, and whether every derivative on it agrees with finite differences."""
    notation = Notation(walk)
    page = Page(f"BACKPROPAGATION IN THE NETWORK {'-'.join(map(str, walk.sizes))}")
    page.add(*_introduction(walk, notation, remarks))
    ok = scalar_chain_rule(page, walk, notation)
    ok &= vector_chain_rule(page, walk, notation)
    page.part("Gradient-based optimization", *_recipe(walk))
    page.part("Forward propagation", *_composition(walk, notation))
    page.part("The gradients of the outputs", *_output_gradients(walk, notation))
    page.part("The gradients of the parameters", *_parameter_gradients(walk, notation))
    page.part("What needs what", *_dependence(walk, notation))
    page.part("The forward propagation phase", *_forward(walk, notation))
    page.part("The backward propagation phase", *_backward(walk, notation))
    return page, ok and walk.ok


def _introduction(walk: Walk, notation: Notation, remarks: str) -> list[Block]:
    each = zip(notation.phi[1:], walk.activations, strict=True)
    phi = ", ".join(dict.fromkeys(f"{symbol} = {activation.label}" for symbol, activation in each))
    layers = f"{walk.L or 'No'} hidden layer{'s' * (walk.L != 1)}{' with ' * bool(phi)}{phi}"
    samples = f"{walk.n} sample{'s' * (walk.n > 1)}{', ' * bool(remarks)}{remarks}"
    return [
        Words(f"{layers}, linear output, ℓ(o,y) = {notation.loss}, {samples}."),
        Table([
            ("the text: a sample", "a column", "here and in the code", "a row of n"),
            ("x, h_l, o", "d_l", "X, h_l, o", "n×d_l"),
            ("W_l, b_l", "d_{l-1}×d_l, d_l", "W_l, b_l", "the same"),
            ("W_lᵀ h_{l-1} + b_l", "d_l", "h_{l-1} W_l + b_l", "n×d_l, row by row"),
            ("∇a, for ∇_a^ℓ(o,y)", "the shape of a", "da = ∂ℓ/∂a", "the shape of a"),
        ], "<<<<", (20, 23, 20, 20)),
    ]  # fmt: skip


def _recipe(walk: Walk) -> list[Block]:
    losses, arrays = walk.descent.losses, walk.arrays
    drawn = ", ".join(f"{name} {times(arrays[name].shape)}" for name in walk.parameters)
    last = len(losses) - 1
    shown = [*[t for t in SHOWN if t < last][:7], last]
    return [
        Item(1, f"Initialize parameters Θ to randomly chosen values: {drawn}; {_count(walk):,} numbers."),
        Item(2, "Calculate the output o using Θ as the model parameters (part 8, steps 1 to 3)."),
        Item(3, "Compute the loss ℓ(o,y) with respect to the desired targets y (part 8, step 4)."),
        Item(4, "Compute the gradient of the loss with respect to the parameters, ∇Θ (part 9)."),
        Item(5, f"Update parameters with the negative gradient and learning rate η = {ETA}: Θ ← Θ − η ∇Θ."),
        Item(6, f"Go back to step 2 and iterate till convergence is achieved in the loss: {N_ITER_NO_CHANGE} iterations in a "
                f"row in which it did not fall by {TOL:g} below the lowest so far."),
        Table([("iteration", *(f"{t:,}" for t in shown)), ("loss", *(number(losses[t], 4) for t in shown))],
              "<" + ">" * len(shown), (9, *[8] * len(shown))),
        Formula(walk.descent.stopped),
    ]  # fmt: skip


def _composition(walk: Walk, notation: Notation) -> list[Block]:
    phi, x, X, L = notation.phi, notation.x, notation.X, walk.L
    if L == 0:
        words = "There is no hidden layer: o is an affine function of the input."
        return [Words(words), Pair(*notation.output(1))]
    pairs: list[Block] = []
    text, ours = "o = W_oᵀ {} + b_o", "o = {} W_o + b_o"
    for l in range(L, -1, -1):
        if L > 3 and l < L - 1:
            pairs += [Formula("  ⋮"), Pair(f"  = W_oᵀ {phi[L]}(W_{L}ᵀ … {phi[1]}(W_1ᵀ x + b_1) … + b_{L}) + b_o",
                                           f"  = {phi[L]}(… {phi[1]}(X W_1 + b_1) … W_{L} + b_{L}) W_o + b_o")]  # fmt: skip
            break
        pairs.append(Pair(text.format(x[l]), ours.format(X[l])))
        if l:
            text = "  = " + text[4:].format(f"{phi[l]}(W_{l}ᵀ {{}} + b_{l})")
            ours = "  = " + ours[4:].format(f"{phi[l]}({{}} W_{l} + b_{l})")
    general = "φ" if len(set(phi[1:])) == 1 else "φ_l"
    return [
        Words(f"h_l = {general}(W_lᵀ h_{{l-1}} + b_l) with h_0 = x. Working backwards from the output, o is a composite function "
              "of the input:"),
        *pairs,
    ]  # fmt: skip


def _output_gradients(walk: Walk, notation: Notation) -> list[Block]:
    names = ["do", *(f"dh_{l}" for l in range(walk.L, 0, -1))]
    pairs: list[Block] = [Pair(*notation.equations[name][:2]) for name in names]
    if not walk.L:
        return [*pairs, Words("There is no hidden layer whose output would have a gradient.")]
    each = zip(notation.phi[1:], map(derivative_in_words, walk.activations), strict=True)
    formulas = "; ".join(f"{symbol}′ = {formula}" for symbol, formula in dict.fromkeys(each) if formula)
    general = "φ" if len(set(notation.phi[1:])) == 1 else "φ_l"
    where = f" with {formulas}," * bool(formulas)
    return [
        *pairs,
        Words(f"δ_l = dh_l ⊙ {general}′(z_l),{where} is the gradient with respect to z_l = h_{{l-1}} W_l + b_l: the step "
              f"through {general}."),
    ]  # fmt: skip


def _parameter_gradients(walk: Walk, notation: Notation) -> list[Block]:
    layers = notation.layer[:0:-1]
    product = "dW_l = Σ_i (row i of h_{l-1})ᵀ (row i of δ_l)" if walk.L else "dW_o = Σ_i (row i of X)ᵀ (row i of do)"
    mean = (
        "The mean's 1/n is in do, and only there."
        if walk.network.loss.reduction == "mean"
        else "ℓ is a sum, so there is no 1/n."
    )
    return [
        *(Pair(*notation.equations[f"d{kind}_{m}"][:2]) for kind in "Wb" for m in layers),
        Words(f"The text omits the biases for brevity. A product of rows adds up the samples: {product}. {mean}"),
    ]


def arrows(walk: Walk) -> dict[str, str]:
    """Return for each gradient of the text the one that feeds into it, read off the recorded step: ``{"dW_o": "do", ...}``."""
    made = {buffer.name: operation for operation in walk.step.operations for buffer in operation.written}

    def source(
        name: str,
    ) -> str:  # the nearest gradient that the text has: delta is ours; do and db_o are one operation's
        above = next((a for a in walk.step.needs(made[name]) if a in walk.checks and a != name), "do")
        return source(above) if above.startswith("delta") else above

    return {name: source(name) for name in walk.checks if name != "do" and not name.startswith("delta")}


def _dependence(walk: Walk, notation: Notation) -> list[Block]:
    feeds, count = arrows(walk), _count(walk)
    arrow = {a: f"∇{a[1:]} ⇐ ∇{b[1:]}" for a, b in feeds.items()}
    order = ", ".join(f"∇{name[1:]}" for name in walk.checks if name == "do" or name[:2] == "dh")
    forward, backward = notation.forward_flops, notation.backward_flops
    inner = "So ∇o comes first."
    if walk.L:
        inner = (
            "The layers near the input depend on those further away from it, and not the other way around. So start with the "
            f"parameters closest to the output and move backwards: {order}."
        )
    return [
        Words("A ⇐ B: B feeds into A; in other words, A requires the computation of B first. Read off the program, not off the "
              "formulas:"),
        *(Pair(arrow[f"dW_{m}"], arrow[f"db_{m}"]) for m in notation.layer[:0:-1]),
        *(Pair(arrow[f"dh_{l}"]) for l in range(walk.L, 0, -1)),
        Words(f"{inner} All {count:,} derivatives cost {backward:,} FLOP, {backward / forward:.1f} times the forward phase; finite "
              f"differences would take {2 * count:,} forward phases, {2 * count * forward:,} FLOP."),
    ]  # fmt: skip


def _forward(walk: Walk, notation: Notation) -> list[Block]:
    L, n, d, arrays = walk.L, walk.n, walk.sizes, walk.arrays
    blocks: list[Block] = [Arrays({name: arrays[name] for name in ("X", "y", *walk.parameters)})]
    for l in range(1, L + 1):
        m, above = str(l), notation.layer[l + 1]
        if l == 1:
            blocks.append(Stage(1, "Compute the output of the first hidden layer as a function of the input"))
        if l == 2:
            words = "For each hidden layer, compute the output of that layer as a function of the output of the previous layer"
            blocks.append(Stage(2, words))
        shapes = f"{n}×{d[l]} = {n}×{d[l - 1]} · {d[l - 1]}×{d[l]} + {d[l]}"
        store = f"store h_{m} for ∇W_{above} and {notation.phi[l]}′(z_{m})"
        blocks += [
            Pair(*notation.output(l)),
            Note(store, shapes, f"{notation.output_flops(l):,} FLOP"),
            Arrays({name: arrays[name] for name in (f"z_{m}", f"h_{m}")}),
        ]
    if L == 0:
        blocks.append(Stage(1, "Compute the output of the first hidden layer: there is none, L = 0."))
    if L < 2:
        blocks.append(Stage(2, f"For each hidden layer above it: there is none, L = {L}."))
    last = L + 1
    return [
        *blocks,
        Stage(3, "Finally, compute the output of the neural network"),
        Pair(*notation.output(last)),
        Note("store o for ∇o", f"{n}×{d[-1]} = {n}×{d[-2]} · {d[-2]}×{d[-1]} + {d[-1]}", f"{notation.output_flops(last):,} FLOP"),
        Arrays({"o": arrays["o"]}),
        Stage(4, "Now compute the loss of the model, the error of the predicted output o compared to the desired output y"),
        Pair(f"ℓ(o,y) = {number(walk.loss)}", f"loss = {notation.loss}"),
        Note("", f"1 from {n}×{d[-1]}", f"{notation.loss_flops:,} FLOP"),
        Words(f"The forward pass is now complete: {notation.forward_flops:,} FLOP."),
    ]  # fmt: skip


def _backward(walk: Walk, notation: Notation) -> list[Block]:
    L = walk.L

    def gradients(*names: str, store: str = "") -> list[Block]:
        blocks: list[Block] = []
        for name in names:
            text, ours, shapes, flops = notation.equations[name]
            verdict = walk.verdict(walk.checks[name].error) + (f"   store it for use {store}" if store else "")
            blocks += [Pair(text, ours), Note(verdict, shapes, f"{flops:,} FLOP")]
        return [*blocks, Arrays({str(walk.step.buffers[name]): walk.arrays[name] for name in names})]

    blocks = [
        Stage(1, "Compute gradient of the loss with respect to the output"),
        *gradients("do", store="in steps 2 and 3" if L else "in step 2"),
        Stage(2, "Compute gradients of the loss with respect to the parameters of the output layer"),
        *gradients("dW_o", "db_o"),
    ]
    if L:
        blocks += [
            Stage(3, f"Compute gradient of the loss with respect to the output of the outermost hidden layer H_{L}"),
            *gradients(f"dh_{L}", store="in steps 4 and 5" if L > 1 else "in step 4"),
            Stage(4, "Compute gradients of the loss with respect to the parameters of the outermost hidden layer "
                     f"H_{L}, through δ_{L}"),
            *gradients(f"delta_{L}", f"dW_{L}", f"db_{L}"),
        ]  # fmt: skip
    for l in range(L - 1, 0, -1):
        words = f"Let l = {l}. Compute and store gradients of outputs and parameters of that layer using gradients of layer {l + 1}"
        store = f"here and for l = {l - 1}" if l > 1 else "in this step"
        blocks += [Stage(5, words), *gradients(f"dh_{l}", store=store)]
        blocks += gradients(f"delta_{l}", f"dW_{l}", f"db_{l}")
        if l > 1:
            blocks.append(Stage(6, f"l = {l} is not 1: set l = {l - 1}, go back to step 5."))
    if L == 1:
        blocks.append(Stage(5, "l = L − 1 = 0 is the input, which has no parameters: nothing to compute."))
    end = Stage(6, "l = 1: terminate.") if L else Stage(3, "L = 0: there is no hidden layer, terminate.")
    return [*blocks, end, *_end(walk, notation)]


def _end(walk: Walk, notation: Notation) -> list[Block]:
    worst = max(check.error for check in walk.checks.values())
    losses, parameters = walk.descent.losses, walk.parameters
    fall, slope = losses[0] - losses[1], ETA * sum(float((walk.arrays[f"d{name}"] ** 2).sum()) for name in parameters)
    verb = f"falls by {number(fall)}" if fall >= 0 else f"rises by {number(-fall)}, since η is too large here"
    return [
        Words("The backward pass is now complete and the gradients have been computed: "
              f"{len(walk.checks)} arrays, {notation.backward_flops:,} FLOP, the largest relative error {worst:.0e}. Phew!"),
        Words(f"The update of part 3, step 5, takes the loss from {number(losses[0])} to {number(losses[1])}. It {verb}; to first "
              f"order it falls by η |∇Θ|² = {number(slope)}."),
        Arrays({name: walk.descent.updated[name] for name in parameters}),
    ]  # fmt: skip


def _count(walk: Walk) -> int:
    """Return the number of parameters."""
    return sum(walk.arrays[name].size for name in walk.parameters)
