"""How a tier stores a block: frames that name their codec and prove their bytes, and the gate that
says which codecs a model may use. Importing this package, `frame` or `gate` does not import torch.
"""
