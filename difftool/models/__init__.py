"""The networks: U-Net, autoencoder, text encoder, and the codecs between pictures and x0.

They know no noise schedule. `configs` is torch-free and is the preset schema; nothing here imports
torch before a network is asked for.
"""
