"New single-cell RNA-seq counts from a latent diffusion model; the names that most scripts need are loaded at first use"
__version__ = "0.1.0"
__all__ = ['SCLD','evaluate','perfect_fit','read_counts','split']

_homes = dict(SCLD='model', evaluate='report', perfect_fit='perfect', read_counts='files', split='labels')

def __getattr__(name):
    from importlib import import_module
    if name not in _homes: raise AttributeError(f"module 'scld' has no attribute {name!r}")
    return getattr(import_module(f'scld.{_homes[name]}'), name)

def __dir__(): return sorted({*globals(),*__all__})
