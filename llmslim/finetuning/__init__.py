"""Fine-tune an encoder or decoder as a classifier on a GLUE task, by the labels alone or with a teacher.

A model without the task's classification head gets a fresh one. With --teacher, a classifier of the same task, it
learns from that one's distribution over the classes, too, and from what it has inside; of a teacher with other tokens
from the classes alone (--hidden 0 --attention 0). --glue names the task. The data are nyu-mll/glue of the Hub, or of
--data FOLDER.
"""
