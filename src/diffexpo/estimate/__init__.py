"""What a run takes, from its configuration alone: memory, disk and cost, what makes it fit, and what to do
when memory runs out all the same.

activations    what a network keeps alive while it runs, on the meta device
memory         the arithmetic of the largest memory
networks       the base model without its weights, and published sizes
method         what a run's method and settings mean for rows, versions and images
resources      the estimate itself
advice         the one table of settings that take less
room           whether the device has room, asked before anything is loaded
out_of_memory  the message when an allocation fails
"""
