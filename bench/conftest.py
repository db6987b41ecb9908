"""All contenders run in a process like a training's: freed memory is kept, as `fastmmkd.engine.device` arranges it."""

from fastmmkd.engine.device import keep_freed_memory

keep_freed_memory()
