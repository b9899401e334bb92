"""Training methods, one file each.

A method is an `nn.Module` that is built from its students. `forward(images)` takes images (N, C, H, W), or
(S, N, C, H, W) with a view for each student, and returns named outputs, among them `student_logits` (S, N, K) and
`teacher_logits` (N, K) or None. `loss(outputs, target)` returns a dict of named scalars, among them their sum `loss`.
`teacher_kind` says what the teacher is; None where there is none.
"""
