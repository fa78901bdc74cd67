"""A runtime that keeps to the protocol, or fails in the way its first argument says."""

import os
import signal
import sys
import time

import numpy as np
import onnxruntime

from normswap.verification.runtimes.serve import serve

WAY = sys.argv[1]


class Loaded:
    """A file in onnxruntime, whose outputs are wronged on the way."""

    inputs, outputs = (), ()
    version = "1.0"

    def __init__(self, path, precision, outputs):
        if WAY == "missing":
            raise ModuleNotFoundError("No module named 'stub'", name="stub")
        if WAY == "refuses":
            raise ValueError("no kernel\n   for Conv")
        if WAY == "crashes at load":
            os.kill(os.getpid(), signal.SIGSEGV)
        if WAY == "hangs at load":
            time.sleep(600)
        self.names, self.precision = outputs, "f32" if precision == "f32" else "bf16"
        if WAY == "fails by default" and precision == "default":
            raise ValueError("no bf16 here")
        self.session = onnxruntime.InferenceSession(str(path))

    def run(self, arrays):
        """Return the outputs, or do what is to be tried."""
        batch = len(next(iter(arrays.values())))
        if WAY == "crashes" and batch == 5:
            print("stub: out of luck", file=sys.stderr)
            sys.stderr.flush()
            os.abort()
        if WAY == "ends" and batch == 5:
            os._exit(3)
        if WAY == "raises" and batch == 5:
            raise ValueError("five is too many")
        if WAY == "hangs" and batch == 5:
            time.sleep(600)
        if WAY == "chats":
            print("chat " * 100_000)
            print("chat " * 100_000, file=sys.stderr)
        found = dict(zip(self.names, self.session.run(self.names, arrays), strict=True))
        if WAY == "wrong":
            found = {name: array * np.float32(1.001) for name, array in found.items()}
        if WAY == "not finite":
            found = {name: array * np.float32(np.nan) for name, array in found.items()}
        if WAY == "another shape":
            found = {name: array[..., None] for name, array in found.items()}
        if self.precision == "bf16":
            found = {name: array * np.float32(1.01) for name, array in found.items()}
        return found


if __name__ == "__main__":
    serve(Loaded, "stub")
