"""Run the command line with a model that breaks for good: ``failing.py STEPS ARGS…``.

After so many steps of an InRa model every forward pass fails, as after a fault of the device.
"""

import sys
from typing import Any

from flexalign.cli.app import main
from flexalign.inra import InRaModel

left = int(sys.argv.pop(1))
forward = InRaModel.forward


def counted(self: InRaModel, *args: Any, **kwargs: Any) -> Any:
    global left
    left -= 1
    if left < 0:
        raise RuntimeError("the device is lost")
    return forward(self, *args, **kwargs)


InRaModel.forward = counted  # type: ignore[method-assign]
main()
