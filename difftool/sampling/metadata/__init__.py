"""What a picture says about itself, a file a dialect.

a1111   the `parameters` text that other tools read, both ways
chunk   the `difftool` JSON chunk, from which a picture can be made again exactly
grids   the chunks of a grid's pictures
comfy   the graph of ComfyUI's nodes
others  the JSON of InvokeAI, NovelAI, SwarmUI and Fooocus
named   how files are named, and where they are found
found   what of another tool's picture is taken over, and what is listed
files   pictures with the first two, and the request in any of them
shown   all of it, for `convert PICTURE --inspect`
"""
