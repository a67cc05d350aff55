"""Of whose shares too few devices hold any: by counting, as of two that differ either may lie."""

from collections.abc import Collection, Mapping

Said = Mapping[int, Collection[int]]


def holders_against(said: Said) -> dict[int, list[int]]:
    """Return the devices that others complain of, and these; a device that is out has no say.

    Parameters
    ----------
    said : mapping of int to collection of int
        By device, those of which it holds no share.

    Examples
    --------
    >>> holders_against({1: [], 2: [1, 9], 3: [1]})
    {1: [2, 3]}
    """
    by_owner = {owner: [n for n in sorted(said) if owner in said[n]] for owner in sorted(said)}
    return {owner: holders for owner, holders in by_owner.items() if holders}


def out_by_complaints(said: Said, threshold: int) -> dict[int, list[int]]:
    """Return the devices of whose shares fewer others than the threshold hold any, and who says so.

    If such a device then failed, nobody could unmask the sum. Out is first the one that most
    complain of, and with it its own complaints; of equals, the one that complains most itself.

    Parameters
    ----------
    said : mapping
        As of `holders_against`.
    threshold : int
        Shares that give a secret back.

    Examples
    --------
    Of seven devices, one is complained of by two, and has its revenge:

    >>> said = {1: [7], 2: [7], 3: [], 4: [], 5: [], 6: [], 7: [1]}
    >>> out_by_complaints(said, threshold=5), out_by_complaints(said, threshold=4)
    ({7: [1, 2]}, {})
    """
    left, out = dict(said), {}
    while complaints := holders_against(left):
        worst = max(complaints, key=lambda owner: (len(complaints[owner]), len(left[owner])))
        if len(left) - 1 - len(complaints[worst]) >= threshold:
            break
        out[worst] = complaints[worst]
        del left[worst]
    return out
