{{/* What the containers of head and hosts share. */}}
{{- define "halfmoon.env" -}}
- {name: RAY_AUTH_MODE, value: token}
- name: RAY_AUTH_TOKEN
  valueFrom: {secretKeyRef: {name: {{ .Release.Name }}-ray, key: auth_token}}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- {name: RAY_worker_niceness, value: "0"}
- {name: PYTHONSAFEPATH, value: "1"}
- {name: GRPC_ENABLE_FORK_SUPPORT, value: "0"}
{{- end }}

{{- define "halfmoon.mounts" -}}
- {name: shm, mountPath: /dev/shm}
- {name: ray, mountPath: /tmp/ray}
{{- if .Values.modelClaim }}
- {name: model, mountPath: {{ required "config.model.path is where modelClaim is mounted" (dig "model" "path" "" .Values.config) | quote }}, readOnly: true}
{{- end }}
{{- end }}

{{- define "halfmoon.volumes" -}}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ add .Values.store.arenaMiB .Values.shmExtraMiB }}Mi}
- name: ray
  emptyDir: {}
{{- if .Values.modelClaim }}
- name: model
  persistentVolumeClaim: {claimName: {{ .Values.modelClaim }}, readOnly: true}
{{- end }}
{{- end }}

{{- define "halfmoon.security" -}}
{{- if .Values.lockMemory -}}
securityContext: {capabilities: {add: [IPC_LOCK]}}
{{- end }}
{{- end }}

{{/* halfmoon.yaml: the values' config under what the chart decides. */}}
{{- define "halfmoon.config" -}}
{{- $decided := dict
  "prefill" (dict "num_workers" (int .Values.prefill.replicas))
  "decode" (dict "num_workers" (int .Values.decode.replicas))
  "both" (dict "num_workers" (int .Values.both.replicas))
  "store" (dict "arena_bytes" (mul .Values.store.arenaMiB 1048576))
  "proxy" (dict "host" "0.0.0.0")
  "security" (dict "insecure" (dig "security" "insecure" true .Values.config))
  "model" (dict "device" (ternary "cuda" "cpu" (gt (int .Values.hosts.gpus) 0))) -}}
{{- toYaml (mergeOverwrite (deepCopy .Values.config) $decided) }}
{{- end }}
