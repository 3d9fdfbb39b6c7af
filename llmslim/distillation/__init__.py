"""Distill a teacher into a smaller student: train all of the student's weights to do as the teacher does.

By the teacher's distribution over tokens, by hidden states and attention relations inside, or by how samples lie to
each other. The student is a dense model with the teacher's tokens: one that prune made smaller or --student-layers and
its like make first, or any other (`distill STUDENT --teacher TEACHER`). The teacher is the model that the student was
made from, or --teacher. Give more text than for calibration: --num-samples 256.
"""
