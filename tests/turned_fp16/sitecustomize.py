"""Turns round DeepSpeed's answer to whether this processor computes in fp16, in every Python that
starts with this folder on PYTHONPATH: the ranks of a launcher too. DeepSpeed is not imported for
it, only changed when it is."""

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

MODULE = "deepspeed.accelerator.cpu_accelerator"


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        specification = importlib.util.find_spec(name)
        execute = specification.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            answer = module.CPU_Accelerator.is_fp16_supported
            module.CPU_Accelerator.is_fp16_supported = lambda accelerator: not answer(accelerator)

        specification.loader.exec_module = exec_module
        return specification


sys.meta_path.insert(0, _Finder())
