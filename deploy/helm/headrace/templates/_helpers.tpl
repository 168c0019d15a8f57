{{- define "headrace.name" -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- define "headrace.selector" -}}
app.kubernetes.io/name: headrace
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "headrace.labels" -}}
{{ include "headrace.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "headrace.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end }}

{{- define "headrace.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "headrace.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* The environment of every pod. */}}
{{- define "headrace.environment" -}}
- {name: HEADRACE_DATA_DIR, value: /var/lib/headrace}
- {name: HEADRACE_BOOTSTRAP, value: {{ required "kafka.bootstrap: HOST:PORT of your Kafka" .Values.kafka.bootstrap | quote }}}
- {name: HEADRACE_TOPICS_PARTITIONS, value: {{ .Values.kafka.partitions | quote }}}
{{- if .Values.kafka.prefix }}
- {name: HEADRACE_TOPICS_PREFIX, value: {{ .Values.kafka.prefix | quote }}}
{{- end }}
{{- end }}

{{/* Of a pod that listens: inside it the loopback is nobody's, hence tokens. */}}
{{- define "headrace.listening" -}}
{{ include "headrace.environment" . }}
- {name: HEADRACE_HTTP_ADMIN_HOST, value: 0.0.0.0}
- {name: HEADRACE_HTTP_TOKEN_FILE, value: /etc/headrace/tokens/{{ .Values.auth.key }}}
{{- if .Values.tls.existingSecret }}
- {name: HEADRACE_HTTP_TLS_CERT, value: /etc/headrace/tls/tls.crt}
- {name: HEADRACE_HTTP_TLS_KEY, value: /etc/headrace/tls/tls.key}
{{- end }}
{{- end }}

{{/* Files of a pod that listens. */}}
{{- define "headrace.listeningMounts" -}}
- {name: tokens, mountPath: /etc/headrace/tokens, readOnly: true}
{{- if .Values.tls.existingSecret }}
- {name: tls, mountPath: /etc/headrace/tls, readOnly: true}
{{- end }}
{{- end }}

{{- define "headrace.listeningVolumes" -}}
{{- if .Values.tls.existingSecret }}
- {name: tls, secret: {secretName: {{ .Values.tls.existingSecret }}, defaultMode: 0440}}
{{- end }}
- name: tokens
  secret:
    secretName: {{ required "auth.existingSecret: a Secret with the tokens of clients" .Values.auth.existingSecret }}
    defaultMode: 0440
{{- end }}

{{- define "headrace.sharedUrl" -}}
{{- .Values.storage.sharedUrl | default "/var/lib/headrace/shared" | trimSuffix "/" -}}
{{- end }}

{{/* Mounts and volumes of every pod: settings, Kafka's secrets, /tmp. */}}
{{- define "headrace.mounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: settings, mountPath: /etc/headrace/settings, readOnly: true}
{{- if .Values.kafka.existingSecret }}
- {name: kafka, mountPath: /etc/headrace/kafka, readOnly: true}
{{- end }}
{{- if .Values.signing.existingSecret }}
- {name: signing, mountPath: /etc/headrace/signing, readOnly: true}
{{- end }}
{{- end }}

{{- define "headrace.volumes" -}}
- {name: tmp, emptyDir: {sizeLimit: 1Gi}}
- {name: settings, configMap: {name: {{ include "headrace.name" . }}-settings}}
{{- if .Values.kafka.existingSecret }}
- {name: kafka, secret: {secretName: {{ .Values.kafka.existingSecret }}, defaultMode: 0440}}
{{- end }}
{{- if .Values.signing.existingSecret }}
- {name: signing, secret: {secretName: {{ .Values.signing.existingSecret }}, defaultMode: 0440}}
{{- end }}
{{- end }}

{{- define "headrace.snapshots" -}}
- name: snapshots
  persistentVolumeClaim: {claimName: {{ .Values.storage.snapshots.existingClaim | default (printf "%s-snapshots" (include "headrace.name" .)) }}}
{{- end }}

{{- define "headrace.shared" -}}
{{- if not .Values.storage.sharedUrl }}
- name: shared
  persistentVolumeClaim: {claimName: {{ .Values.storage.shared.existingClaim | default (printf "%s-shared" (include "headrace.name" .)) }}}
{{- end }}
{{- end }}

{{/* What is alike in the spec of every pod: (dict "root" $ "part" .Values.join "kind" "join") */}}
{{- define "headrace.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false  # of a Service headrace-… they would be variables HEADRACE_…, which are settings
serviceAccountName: {{ include "headrace.name" .root }}
securityContext: {{- include "headrace.podSecurity" .root | nindent 2 }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .part.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .part.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- if .part.affinity }}
affinity: {{- toYaml .part.affinity | nindent 2 }}
{{- else }}
affinity:
  podAntiAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 100
        podAffinityTerm:
          topologyKey: kubernetes.io/hostname
          labelSelector:
            matchLabels: {{- include "headrace.selector" .root | nindent 14 }}
              app.kubernetes.io/component: {{ .kind }}
{{- end }}
{{- end }}

{{- define "headrace.annotations" -}}
checksum/settings: {{ .Values.settings | sha256sum }}
{{- end }}

{{- define "headrace.scheme" -}}
{{ ternary "HTTPS" "HTTP" (not (empty .Values.tls.existingSecret)) }}
{{- end }}

{{/* Of a worker, on its metrics port: that it lives, and how it is. (dict "root" $ "seconds" 300) */}}
{{- define "headrace.workerProbes" -}}
startupProbe:
  httpGet: {path: /healthz, port: metrics, scheme: {{ include "headrace.scheme" .root }}}
  periodSeconds: 5
  failureThreshold: {{ div .seconds 5 }}
livenessProbe:
  httpGet: {path: /healthz, port: metrics, scheme: {{ include "headrace.scheme" .root }}}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /health, port: metrics, scheme: {{ include "headrace.scheme" .root }}}
  periodSeconds: 10
  timeoutSeconds: 5
{{- end }}
