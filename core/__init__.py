"""The kernel: cursors, declarations, initialisation, random keys, running a model. It knows no mesh and no training.

Its public names are those of `sapwood` itself (`sw.init`, `sw.apply`, `sw.Vars`); other rooms import its files by name.
"""
