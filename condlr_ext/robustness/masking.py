"""Detection of gradient masking: accuracy that comes from gradients an attack cannot use, not from robustness.

Sources: Athalye, Carlini, Wagner (arXiv 1802.00420), section 3.1; Carlini et al. (arXiv 1902.06705), section 5; Croce
and Hein (arXiv 2003.01690), section 4.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..attacks.balls import linf_norm

TINY_GRADIENT = 1e-10
MAX_SHARE = 0.05  # of samples that saturate or have no gradient; above, averages over all samples mean little
MAX_GAP = 0.05  # between two accuracies; on networks without masking the best attacks differ by up to three points
MAX_RISE = 0.01  # of accuracy with the budget; more than random starts explain
FLAT_SLOPE = 0.25  # late slope over early slope of an accuracy curve that stops falling ...
HIGH_ACCURACY = 0.25  # ... while it is still above this

_SHARES = {
    "saturated": "the float32 softmax is exactly 1, so that cross-entropy gradients are rounding noise,",
    "zero_gradient": "the input gradient of the cross-entropy is exactly 0",
    "tiny_gradient": f"the input gradient of the cross-entropy is below {TINY_GRADIENT:g}",
    "dead_gradient": "the input gradient is 0 whatever the loss: the network passes none,",
}
_COMPARISONS = (
    ("fgsm", "fgsm64", "FGSM was blinded by saturation"),
    ("pgd-ce", "fgsm", "iterating is weaker than one step"),
    ("pgd-ce", "worst", "attacks on cross-entropy miss what others find"),
)

GUARD_ATTACKS = ("fgsm", "fgsm64", "pgd-ce", "pgd64", "pgd-rescaled", "pgd-dlr")


def gradient_statistics(logits: Tensor, grad: Tensor, unsaturated: Tensor) -> dict[str, Tensor]:
    """Return booleans [B] by name.

    "saturated": the float32 softmax has an entry equal to 1; "zero_gradient" and "tiny_gradient": the largest entry of
    grad is 0, respectively below 1e-10; "dead_gradient": that of unsaturated is 0.

    Args:
        logits: [B, C].
        grad: Input gradient [B, ...] of the cross-entropy.
        unsaturated: Input gradient of the log-odds in float64.
    """
    slope = linf_norm(grad)
    return {
        "saturated": logits.float().softmax(1).amax(1) == 1,
        "zero_gradient": slope == 0,
        "tiny_gradient": slope < TINY_GRADIENT,
        "dead_gradient": linf_norm(unsaturated) == 0,
    }


def flags(result: Mapping[str, Any]) -> list[str]:
    """Return the signs of gradient masking in the result of robustness.evaluate, one sentence each.

    A flag means that the accuracies it names cannot be trusted, not that the network is weak; no flag is no proof.

    Args:
        result: Result of evaluate; comparisons whose numbers are missing are skipped.

    Returns:
        The sentences; none for a network without masking.
    """
    found = []
    for name, text in _SHARES.items():
        if result.get(name, 0) > MAX_SHARE:
            found.append(f"{text} for {result[name]:.1%} of the samples")
    for weak, strong, text in _COMPARISONS:
        if weak in result and strong in result:
            gap, eps = max((a - b, e) for a, b, e in zip(result[weak], result[strong], result["eps"], strict=True))
            if gap > MAX_GAP:
                found.append(f"{text}: {weak} leaves {100 * gap:.1f} points more than {strong} at eps={eps:g}")
    if max(result.get("transfer_only", [0])) > MAX_GAP:
        found.append(
            f"examples made on the surrogate break {max(result['transfer_only']):.1%} of the samples that every attack "
            "on the model itself missed"
        )
    if max(result.get("square_only", [0])) > MAX_GAP:
        found.append(
            f"a search without gradients breaks {max(result['square_only']):.1%} of the samples, which every attack "
            "that uses them missed"
        )
    for name, accuracy in result.get("at_zero", {}).items():
        if abs(accuracy - result["clean"]) * result["n"] > 1.5:  # the rounding of its batch may flip one sample
            found.append(f"at eps=0 {name} finds accuracy {accuracy:.1%} and not the clean {result['clean']:.1%}")
    for name in ("worst", *(n for n in result if n.startswith(("pgd", "apgd")))):
        if name in result:
            curve = [accuracy for _, accuracy in sorted(zip(result["eps"], result[name], strict=True))]
            rise = max((b - a for a, b in zip(curve, curve[1:], strict=False)), default=0)
            if rise > MAX_RISE:
                found.append(f"accuracy under {name} rises by {100 * rise:.1f} points with a larger budget")
    if "worst" in result and plateau(result["eps"], result["worst"], result["clean"]):
        found.append("accuracy under the worst attack stops falling with the budget, far above chance")
    return found


def plateau(eps: Sequence[float], accuracy: Sequence[float], clean: float) -> bool:
    """Return whether an accuracy curve first falls by ten points and then less than a quarter as fast up to its end.

    Args:
        eps: Budgets >= 0.
        accuracy: Accuracies in [0, 1], one per budget; a plateau has more than 0.25 at the last one.
        clean: Accuracy in [0, 1] at budget 0.
    """
    curve = sorted((e, a) for e, a in zip(eps, accuracy, strict=True) if e > 0)
    if not curve:
        return False
    end, left = curve[-1]
    for e, a in curve:
        early, late = (clean - a) / e, (a - left) / (end - e) if end > e else 0
        if left > HIGH_ACCURACY and clean - a > 0.1 and end >= 1.5 * e and late < FLAT_SLOPE * early:
            return True
    return False
