"""Visual prompts that are not quite right: bend a point, a box or a mask, and ask a 3D model with it.

perturb   masks, boxes and points, each made worse by degrees
phantoms  synthetic abdomens with several organs
network   a small 3D network that is asked with a mask, a box or a point
adapters  nnInteractive and SAM-Med3D, asked in the same way
scans     real scans as volumes
surfaces  Dice and surface distance per organ
study     what `pgseg experiment imprecise` measures
curves    its table read: curves over severity with intervals, and one way of training minus another

Nothing of the engine imports this.
"""
