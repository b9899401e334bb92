"""One file a method.

A method is an `nn.Module` built from its students. `forward(images)` takes (N, C, H, W) and returns
`{"student_logits": (S, N, K), "teacher_logits": (N, K) or None}`; `loss(outputs, target)` returns a dict of named
scalars, among them their sum `loss`. `teacher_kind` says what the teacher is, None where there is none.
"""
