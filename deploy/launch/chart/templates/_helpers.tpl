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

{{- define "halfmoon.certs" -}}
{{- if .Values.certsSecret }}
- {name: certs, mountPath: /etc/halfmoon-certs, readOnly: true}
{{- end }}
{{- end }}

{{/* How Prometheus asks for a page, also for the list of pages. */}}
{{- define "halfmoon.asking" -}}
{{- if .Values.certsSecret }}
tlsConfig:
  ca: {secret: {name: {{ .Values.certsSecret }}, key: authority.pem}}
  serverName: halfmoon-member
{{- end }}
{{- if .Values.monitoring.tokenSecret }}
authorization: {type: Bearer, credentials: {name: {{ .Values.monitoring.tokenSecret }}, key: token}}
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
{{- if and (dig "security" "certs" "" .Values.config) (not .Values.certsSecret) }}
{{- fail "certsSecret names the Secret with the certificates; leave config.security.certs out" }}
{{- end }}
{{- $proxy := dict "host" "0.0.0.0" -}}
{{- $is_secure := and .Values.certsSecret (dig "proxy" "keys_file" "" .Values.config) -}}
{{- $security := dict "insecure" (dig "security" "insecure" (not $is_secure) .Values.config) -}}
{{- if .Values.certsSecret }}
{{- $_ := set $security "certs" "/etc/halfmoon-certs" }}
{{- $_ := set $proxy "tls_certificate" "/etc/halfmoon-certs/front.pem" }}
{{- $_ := set $proxy "tls_key" "/etc/halfmoon-certs/front.key" }}
{{- end }}
{{- if .Values.monitoring.tokenSecret }}
{{- $_ := set $security "metrics_token_file" "/etc/halfmoon-metrics/token" }}
{{- end }}
{{- $decided := dict
  "prefill" (dict "num_workers" (int .Values.prefill.replicas))
  "decode" (dict "num_workers" (int .Values.decode.replicas))
  "both" (dict "num_workers" (int .Values.both.replicas))
  "store" (dict "arena_bytes" (mul .Values.store.arenaMiB 1048576))
  "proxy" $proxy
  "security" $security
  "model" (dict "device" (ternary "cuda" "cpu" (gt (int .Values.hosts.gpus) 0))) -}}
{{- toYaml (mergeOverwrite (deepCopy .Values.config) $decided) }}
{{- end }}
