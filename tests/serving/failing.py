"""Run the command line with a model that breaks for good: ``failing.py ARGS…``.

From SIGUSR1 on every forward pass of an InRa model fails, as after a fault of the device.
"""

import signal
import threading
from typing import Any

from flexalign.cli.app import main
from flexalign.inra import InRaModel

broken = threading.Event()
forward = InRaModel.forward


def failing(self: InRaModel, *args: Any, **kwargs: Any) -> Any:
    if broken.is_set():
        raise RuntimeError("the device is lost")
    return forward(self, *args, **kwargs)


InRaModel.forward = failing  # type: ignore[method-assign]
signal.signal(signal.SIGUSR1, lambda *_: broken.set())
main()
