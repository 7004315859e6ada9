"""
检查练习：你的函数要守住一些规律，而不是与某个答案相同。
Check exercises: your function must keep laws; it is not compared with a solution.

    python exercises/check.py 03                    # the exercises of lesson 03
    python exercises/check.py 03_forward_kl         # one of them
    python exercises/check.py faults/03             # find the fault
"""

import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))    # not only exercises/

import torch

from exercises import laws
from runtime.args import make_parser


def contradiction(got, relation, wanted) -> str:
    """Both numbers where they contradict the law most; empty where it holds, within 1e-4."""
    got, wanted = (torch.as_tensor(each).detach().double() for each in (got, wanted))
    if wanted.dim() and got.shape != wanted.shape:
        return f"got shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    excess = {"=": (got - wanted).abs(), ">=": wanted - got, "<=": got - wanted}[relation]
    at = excess.nan_to_num(nan=torch.inf).argmax()
    if excess.flatten()[at] <= 1e-4:
        return ""
    got, wanted = got.flatten()[at], wanted.expand_as(got).flatten()[at]
    return f"got {got:.4f}, wanted {relation} {wanted:.4f}" + f", entry {at}" * (excess.numel() > 1)


def keeps_its_laws(path: Path) -> bool:
    """Prints the laws of NN_name.py, and which of them its function `name` keeps."""
    print(f"== {path.name}")
    name, kept = path.stem[3:], True
    function = runpy.run_path(str(path))[name]
    try:
        for law, *numbers in getattr(laws, name)(function):
            found = contradiction(*numbers)
            print(f"  FAILS {law}: {found}" if found else f"  ok    {law}")
            kept &= not found
    except NotImplementedError:
        print(f"  not filled in yet: write your lines in {path.name}, then check again")
        kept = False
    return kept


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("name", nargs="?", default="[0-9]", help="start of names; default: all")
    parser.add_argument("--solutions", action="store_true", help="check the solutions instead")
    args = parser.parse_args()
    args.name = args.name.zfill(2) if args.name.isdigit() else args.name
    files = sorted((HERE / ("solutions" * args.solutions)).glob(f"{args.name}*.py"))
    if not files:
        parser.error(f"no exercise begins with {args.name}; exercises/README.md lists them")
    sys.exit(not all([keeps_its_laws(file) for file in files]))
