"""Distill a teacher into a smaller student: train all of the student's weights to do as the teacher does.

By the teacher's distribution over tokens, by hidden states and attention inside, by how samples or tokens lie to each
other: each with a weight of its own in one loss, of which the methods are three settings. The student is a dense model
with the teacher's tokens: one that prune made smaller or --student-layers and its like make first, or any other
(`distill STUDENT --teacher TEACHER`). The teacher is the last uncompressed model that the student comes from, or
--teacher. Give more text than for calibration, and your own: --calibration TEXT --num-samples 256.
"""
