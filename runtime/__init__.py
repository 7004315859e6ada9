"""
运行时的管道，与课程内容无关。
The plumbing of a run: functions that scripts call.
"""
