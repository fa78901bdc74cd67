"""Runtimes other than onnxruntime, each in a process of its own, which may crash or hang without harm.

A runtime is a command that is given a folder (`known`). In its ``job.json`` are the ``file`` to load, the ``precision``
("f32", or "default" for what the runtime takes by itself), the names of the ``outputs``, and the files with external
``data``. It loads the file and writes ``loaded.json``: its ``version`` and ``precision``, and of a file that is not
ONNX the ``inputs`` and ``outputs``, each a name, a type and a shape; or what is ``missing`` and the ``reason``; or why
the file is ``refused``.
For each line N on its standard input it reads the arrays in ``N.in`` by name and writes the outputs to ``N.out``, both
as safetensors, then ``N.json``, which is empty or says what ``failed``. A JSON file gets its name when it is whole.
"""
